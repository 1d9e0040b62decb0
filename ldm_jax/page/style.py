"""How a page looks: in light and in dark, on narrow screens and on paper."""

CSS = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --ink: #1c2330; --soft: #5b6676;
  --line: #dfe3ea; --accent: #2457c5; --mark: #fff3d1; --c0: #2457c5; --c1: #d9601a; --c2: #1d8a5f;
  --c3: #a13d9b; --c4: #7a6a00; --c5: #c2304a; }
@media (prefers-color-scheme: dark) { :root { --back: #12151b; --card: #1b2029; --ink: #e6e9ef;
  --soft: #98a3b5; --line: #313946; --accent: #8ab4ff; --mark: #453a1c; --c0: #8ab4ff;
  --c1: #ffa564; --c2: #5fd3a2; --c3: #e393de; --c4: #dcc95a; --c5: #ff8fa1; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui,
  -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 0 0 12px; }
h3 { font-size: 15px; margin: 18px 0 8px; }
h3 .sub { font-weight: 400; margin-left: 8px; }
h4 { font-size: 14px; font-weight: 600; margin: 14px 0 4px; }
p { margin: 0 0 10px; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 14px 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px; margin: 0 0 18px; }
.note, .sub { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.warn { background: var(--mark); border-radius: 6px; padding: 8px 12px; font-size: 14px;
  overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px;
  margin: 6px 0 18px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px; }
.tile b { display: block; font-size: 21px; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr));
  gap: 18px 22px; align-items: end; }
.chart { margin: 0; min-width: 0; }
.chart figcaption { display: grid; grid-template-columns: 1fr auto; gap: 0 10px;
  margin-bottom: 4px; }
.chart figcaption b { font-weight: 600; }
.chart .last { font-variant-numeric: tabular-nums; }
.chart .sub { grid-column: 1 / -1; min-height: 1.5em; display: flex; flex-wrap: wrap; gap: 0 12px; }
svg.curve { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
.axes line { stroke: var(--line); stroke-width: 1; }
.axes line.base { stroke: var(--soft); }
.axes text { fill: var(--soft); font-variant-numeric: tabular-nums; }
svg path { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg circle.hidden { opacity: 0; }
svg circle.hidden:hover { opacity: 1; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
circle.c0 { fill: var(--c0); } circle.c1 { fill: var(--c1); } circle.c2 { fill: var(--c2); }
circle.c3 { fill: var(--c3); } circle.c4 { fill: var(--c4); } circle.c5 { fill: var(--c5); }
.key { display: inline-flex; align-items: center; gap: 5px; font-size: 13px; color: var(--soft); }
.key svg { width: 16px; height: 4px; }
.key path { stroke-width: 4; }
.pictures { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); align-items: start; }
.pictures.wide { grid-template-columns: 1fr; }
.pictures figure { margin: 0; min-width: 0; }
.pictures img { display: block; width: 100%; height: auto; border-radius: 6px;
  border: 1px solid var(--line); background: #fff; }
.pictures.wide img { width: auto; max-width: 100%; max-height: 640px; }
.pictures figcaption { font-size: 13px; color: var(--soft); margin-top: 4px; }
.pictures figcaption b { color: var(--ink); }
.pictures .close { display: none; }
.pictures figure:target { position: fixed; inset: 0; z-index: 9; background: rgba(10, 12, 16, .94);
  padding: 3vmin; display: flex; flex-direction: column; align-items: center;
  justify-content: center; }
.pictures figure:target > a:first-child { display: contents; }
.pictures figure:target img { width: auto; max-width: 100%; max-height: 88vh; min-height: 0;
  min-width: min(92vw, 88vh); object-fit: contain; }
.pictures figure:target figcaption, .pictures figure:target figcaption b { color: #e6e9ef; }
.pictures figure:target .close { display: inline; color: #8ab4ff; margin-left: 14px; }
.scroll { overflow-x: auto; margin-bottom: 14px; }
table { border-collapse: collapse; font-size: 14px; min-width: 50%; }
th, td { padding: 5px 14px 5px 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; }
tbody th { font-weight: 500; }
table.numbers td, table.numbers thead th + th { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; padding: 5px 0 5px 22px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr));
  gap: 0 28px; margin: 0; font-size: 14px; }
dl div { display: flex; justify-content: space-between; gap: 14px; padding: 3px 0;
  border-bottom: 1px solid var(--line); }
dt { color: var(--soft); } dd { margin: 0; text-align: right; overflow-wrap: anywhere;
  min-width: 0; font-variant-numeric: tabular-nums; }
dl.config { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
dl.config .changed { background: var(--mark); padding-left: 6px; padding-right: 6px; }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--accent); }
footer { color: var(--soft); font-size: 13px; padding-bottom: 30px; }
@media print { nav { display: none; } section { break-inside: avoid-page; } }
"""
