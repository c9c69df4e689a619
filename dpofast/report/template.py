"""The HTML and CSS template of report.html, filled in by page.py."""

from string import Template

_STYLE = """
:root { color-scheme: light; --ink: #111827; --soft: #6b7280; --line: #e5e7eb; --blue: #2563eb;
  --orange: #ea580c; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica,
  Arial, "Liberation Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h1 small { display: block; font-size: 13px; font-weight: 500; color: var(--soft); letter-spacing: .04em;
  text-transform: uppercase; }
h2 { font-size: 19px; margin: 40px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
h3 { font-size: 15px; margin: 0 0 6px; }
h4 { font-size: 13px; margin: 0 0 4px; } h4 span { font-weight: 400; color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 20px 0 0; }
.card, figure, .pair, .warning, .box { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 12px 14px; } .card span, .card small { display: block; color: var(--soft); font-size: 12.5px; }
.card b { font-size: 25px; font-weight: 650; font-variant-numeric: tabular-nums; }
.warning { padding: 14px 18px; margin: 0 0 12px; border-left: 4px solid #d97706; }
.warning p { margin: 0 0 6px; } .warning ul { margin: 0; padding-left: 20px; }
.fine { padding: 12px 18px; margin: 0; border-left: 4px solid #059669; background: #fff; border-radius: 6px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 14px; }
figure { margin: 0; padding: 14px 16px; } figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; }
.pair { padding: 12px 16px; margin: 0 0 12px; } .pair header { color: var(--soft); font-size: 13px; }
.pair header b { color: var(--ink); } .pair p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: #374151; padding: 6px 0 10px; }
.images { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; padding: 8px 0 2px; color: var(--soft);
  font-size: 13px; }
.images img { border: 1px solid var(--line); border-radius: 4px; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.side { padding: 8px 12px; border-radius: 6px; background: #f9fafb; border-left: 3px solid var(--blue); }
.side.rejected { border-left-color: var(--orange); }
.box { padding: 8px 16px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; font-weight: 500; color: var(--soft); padding: 3px 18px 3px 0; vertical-align: top;
  white-space: nowrap; width: 1%; }
td { padding: 3px 0; white-space: pre-wrap; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--soft); padding: 4px 0; }
@media (max-width: 700px) { .sides { grid-template-columns: 1fr; } .plots { grid-template-columns: 1fr; } }
@media print { body { background: #fff; } figure, .pair, .warning { break-inside: avoid; } }
"""

PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title: preference run</title>
<style>"""
    + _STYLE
    + """</style>
</head>
<body><main>
<h1><small>Preference run</small>$title</h1>
<div class="cards">$cards</div>
<section><h2>Warnings</h2>$warnings</section>
$plots
<section><h2>Held-out pairs</h2>$pairs</section>
<section><h2>Run</h2><div class="box">$data</div></section>
<section><h2>Settings</h2><div class="box">$settings</div>
<details><summary>All other settings</summary><div class="box">$others</div></details></section>
</main></body>
</html>
"""
)
