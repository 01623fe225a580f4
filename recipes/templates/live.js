// The page follows a run: it is fetched anew when the server says that the run changed, where the reader is stays.
"use strict";

function say(text) {
  document.querySelector(".live").textContent = text;
}

async function renew() {
  const answer = await fetch("/", { cache: "no-store" });
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const opened = [...document.querySelectorAll("details[open] > summary")].map((each) => each.textContent);
  for (const summary of page.querySelectorAll("details > summary")) {
    summary.parentElement.open = opened.includes(summary.textContent);
  }
  const [across, down] = [window.scrollX, window.scrollY];
  document.title = page.title;
  document.querySelector("style").replaceWith(page.querySelector("style"));
  document.body.replaceWith(page.body);
  window.scrollTo(across, down);
}

const events = new EventSource("/events");
events.onmessage = async (event) => {
  if (event.data !== document.body.dataset.version) {
    await renew();
  }
};
events.onerror = () => say("prunex watch does not answer: it was stopped. The page shows what came last.");
