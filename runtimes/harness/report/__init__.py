"""report.html of a bundle: what was made, how well it matches, and what it costs, in one page without a network.

    path = write_report(folder, manifest)

recipe.py reads recipe.json and finds the best that its evidence allows, pictures.py sets pictures side by side, collect.py
brings together what the page says, measuring what nobody passes in; charts.py draws, sheets.py makes the tables, and page.py
fills page.html.j2. Nothing of the machine or of the day comes in: the same inputs give the same bytes.
"""

from runtimes.harness.report.collect import Findings, collect
from runtimes.harness.report.page import REPORT, render_page, write_report

__all__ = ["REPORT", "Findings", "collect", "render_page", "write_report"]
