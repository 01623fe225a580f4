"""What the subcommands share: argparse with our errors."""

import argparse
from typing import NoReturn

from prunex.errors import PrunexError


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as ours: one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise PrunexError(f"{self.prog}: {message}; see {self.prog} --help")
