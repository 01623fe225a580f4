"""An example service: classes, kept patches and relevancy of an uploaded image, from a slim folder or an ONNX graph.

    PRUNEX_MODEL=out/slim uvicorn --factory app:create

Settings are environment variables: PRUNEX_MODEL (a slim folder, or what ``prunex export --kept`` wrote as ``.onnx``),
PRUNEX_MAX_BYTES (of an upload, default 8 MiB) and PRUNEX_MAX_PIXELS (of an image, default 25 million).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image, ImageOps
from starlette.exceptions import HTTPException as StarletteError

import prunex
from prunex import PrunexError
from prunex.pictures import dim_dropped, overlay, png_bytes
from prunex.recipes.data.images import preparation, read_image
from prunex.slim.runtimes import open_graph
from prunex.untrusted import Held, read_picture
from prunex.vit.anatomy import find

Kind = Literal["json", "png"]


@dataclass
class Served:
    """A model as the service needs it; pictures are uint8 [H, W, 3], images float [1, C, H, W]."""

    name: str
    labels: list[str] | None
    prepare: Callable[[Image.Image], tuple[np.ndarray, torch.Tensor]]
    answer: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]  # logits [C], kept bool [gh, gw]
    explain: Callable[[str, torch.Tensor, int | None], torch.Tensor] | None  # a map [gh, gw]; None: it cannot


def open_slim(folder: Path) -> Served:
    """A slim folder: everything."""
    model = prunex.load(folder)
    vit: Any = find(model)[1]

    def answer(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.inference_mode():
            logits = model(image)[0]
        pruning = prunex.attached(vit)
        return logits, None if pruning is None else pruning.trace.kept()[0]

    def explain(method: str, image: torch.Tensor, target: int | None) -> torch.Tensor:
        return prunex.explain(method, vit, image, target).maps[0]

    return Served(str(folder), list(getattr(vit, "label_names", None) or []) or None, preparation(vit), answer, explain)


def open_onnx(file: Path) -> Served:
    """An exported graph: classes, and what is kept where it was exported with ``--kept``; nothing can be explained."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [out.name for out in session.get_outputs()]
    spec = json.loads(session.get_modelmeta().custom_metadata_map.get("prunex", "null"))
    if spec is None or "logits" not in names:
        raise PrunexError(f"{file} does not say how its images are prepared: write it by prunex export")
    run = open_graph("onnx", file, names)
    channels, height, width = spec["input_size"]
    mean, std = (
        torch.tensor(spec[name] or [0.5] * channels, dtype=torch.float32)[:, None, None] for name in ("mean", "std")
    )

    def prepare(image: Image.Image) -> tuple[np.ndarray, torch.Tensor]:
        picture = np.array(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[:channels].float() / 255
        return picture, (pixels - mean) / std

    def answer(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        given = run(image)
        return given["logits"][0], given["kept"][0].bool() if "kept" in given else None

    return Served(str(file), spec.get("labels"), prepare, answer, None)


def setting(name: str, usual: int) -> int:
    """A positive whole number of the environment."""
    text = os.environ.get(name, str(usual))
    if not text.isdecimal() or int(text) < 1:
        raise PrunexError(f"{name}={text!r} is not allowed: give a whole number of at least 1")
    return int(text)


def create() -> FastAPI:
    """The application; a model that cannot be opened is an error now, not at the first request."""
    where = os.environ.get("PRUNEX_MODEL")
    if not where:
        raise PrunexError("PRUNEX_MODEL is not set: give a slim folder, or an ONNX file that prunex export wrote")
    most_bytes, most_pixels = setting("PRUNEX_MAX_BYTES", 8 * 2**20), setting("PRUNEX_MAX_PIXELS", 25_000_000)
    served = open_onnx(Path(where)) if where.endswith(".onnx") else open_slim(Path(where))
    app = FastAPI(title="prunex", version=prunex.__version__)
    turn = Lock()  # a model remembers its last forward: one image at a time

    async def read(request: Request) -> Image.Image:
        """The image in a request's body, which is never held beyond the limits."""
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > most_bytes:
                raise HTTPException(413, f"the upload is over {most_bytes:,} bytes")
        if not content:
            raise HTTPException(400, "the request has no body: send the bytes of an image")

        def small(image: Image.Image) -> None:  # before it is decoded
            if image.width * image.height > most_pixels:
                raise HTTPException(413, f"the image has {image.width} x {image.height} pixels, over {most_pixels:,}")

        held = Held("upload", content=bytes(content))
        try:
            read_picture(held, small)
            return await run_in_threadpool(read_image, held)
        except PrunexError as error:
            if isinstance(error.__cause__, HTTPException):
                raise error.__cause__ from None
            raise HTTPException(
                400, "the body is no image that can be read: send PNG, JPEG, WebP, BMP or TIFF"
            ) from error

    async def looked_at(request: Request, use: Callable[[np.ndarray, torch.Tensor], Any]) -> Any:
        image = await read(request)

        def work() -> Any:
            picture, pixels = served.prepare(image)
            with turn:
                return use(picture, pixels[None])

        return await run_in_threadpool(work)

    @app.get("/health")
    def health() -> dict[str, Any]:
        """That the model is there."""
        return {
            "status": "ok",
            "model": served.name,
            "prunex": prunex.__version__,
            "explains": served.explain is not None,
        }

    @app.post("/predict")
    async def predict(request: Request, top: int = Query(5, ge=1, le=1000)) -> dict[str, Any]:
        """Logits of all classes, and the likeliest ones with their probabilities."""
        logits = (await looked_at(request, lambda picture, pixels: served.answer(pixels)))[0]
        shares = logits.softmax(0)
        order = shares.argsort(descending=True)[:top].tolist()
        names = served.labels or [str(number) for number in range(len(logits))]
        classes = [{"class": number, "label": names[number], "probability": float(shares[number])} for number in order]
        return {"classes": classes, "logits": logits.tolist()}

    @app.post("/kept", response_model=None)
    async def kept(request: Request, format: Kind = "json") -> dict[str, Any] | Response:
        """Which patches are left after the last stage: rows of true and false, or the image with the others pale."""

        def use(picture: np.ndarray, pixels: torch.Tensor) -> dict[str, Any] | Response:
            flags = served.answer(pixels)[1]
            if flags is None:
                raise HTTPException(
                    404, "this model tells no kept patches: it prunes none, or was exported without --kept"
                )
            if format == "png":
                return Response(png_bytes(dim_dropped(picture, flags.numpy())), media_type="image/png")
            return {"kept": flags.tolist(), "share": float(flags.float().mean())}

        return await looked_at(request, use)

    @app.post("/relevancy", response_model=None)
    async def relevancy(
        request: Request,
        method: str = Query("tokentm", max_length=100),
        target: int | None = None,
        format: Kind = "json",
    ) -> dict[str, Any] | Response:
        """What the predicted class, or ``target``, rests on: rows of numbers, or the image with a map over it."""

        def use(picture: np.ndarray, pixels: torch.Tensor) -> dict[str, Any] | Response:
            if served.explain is None:
                raise HTTPException(404, "an ONNX graph explains nothing: serve a slim folder")
            try:
                heat = served.explain(method, pixels, target)
            except PrunexError as error:
                raise HTTPException(400, str(error)) from error
            if format == "png":
                return Response(png_bytes(overlay(picture, heat.numpy())), media_type="image/png")
            return {"method": method, "relevancy": heat.tolist()}

        return await looked_at(request, use)

    @app.exception_handler(StarletteError)
    async def refused(request: Request, error: StarletteError) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def wrong_option(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 422)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "the service failed; its log says how"}, 500)

    return app
