"""Run program.py of each folder that is named, in that folder, and keep what it prints in printed.txt beside it."""

import contextlib
import os
import runpy
import sys
from pathlib import Path


def main():
    for folder in map(Path, sys.argv[1:]):
        os.chdir(folder)
        print(f"--- {folder}", flush=True)
        with open("printed.txt", "w") as file, contextlib.redirect_stdout(file):
            runpy.run_path("program.py", run_name="__main__")


if __name__ == "__main__":
    main()
