"""Work at the full size of SD3.5-Medium, on random weights: no download, and nothing said of pictures.

python -m benchmarks.full_size make DIR
python -m benchmarks.full_size run --model DIR
python -m benchmarks.full_size growth
python -m benchmarks.full_size interrupted --model DIR
"""

from __future__ import annotations

import click

from benchmarks.full_size.interrupted import interrupted
from benchmarks.full_size.make import make
from benchmarks.full_size.run import growth, run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """SD3.5-Medium's exact sizes, with random weights."""


for command in (make, run, growth, interrupted):
    main.add_command(command)

if __name__ == "__main__":
    main()
