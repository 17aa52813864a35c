"""The page's CSS: light, and dark where the reader's system is."""

CSS = """
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --edge: #e6e5e1; --ink: #1f2328; --muted: #68707a; --grid: #e6e5e1;
  --line: #2f6690; --bad: #b3402e; --warn: #a86e00; --good: #3c7a57;
  --training: #5b8fb9; --lost: #d98c7e; --starting: #e3c383; --saving: #a79cc7; --recovery: #b3402e;
  --stopped: #dddcd7; --validating: #7fb09a; }
@media (prefers-color-scheme: dark) { :root {
  --page: #16181b; --card: #1d2024; --edge: #32363c; --ink: #e3e5e8; --muted: #98a0aa; --grid: #32363c;
  --line: #7fb2dc; --bad: #e58a78; --warn: #dfae55; --good: #7fbf9b;
  --training: #4f83ad; --lost: #a5665b; --starting: #b39350; --saving: #8479a8; --recovery: #e07b67;
  --stopped: #3d4147; --validating: #5f9a83; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; display: inline; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 0 0 2px; }
p { margin: 4px 0; }
.state { display: inline-block; margin-left: 10px; padding: 1px 10px; border-radius: 10px; font-size: 13px;
  border: 1px solid currentColor; color: var(--muted); vertical-align: 4px; }
.state.done { color: var(--good); } .state.failed { color: var(--bad); }
.path, .caption, footer { color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
.caption { margin-bottom: 6px; }
.note { border-left: 3px solid var(--warn); padding: 6px 12px; background: var(--card); margin: 14px 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 1px;
  margin: 18px 0; background: var(--card); border: 1px solid var(--edge);
  border-radius: 6px; overflow: hidden; }
.figures div { box-shadow: 0 0 0 1px var(--edge); padding: 10px 14px; }
.figures dt { color: var(--muted); font-size: 12px; }
.figures dd { margin: 0; font-size: 19px; font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures small { display: block; font-size: 12px; color: var(--muted); white-space: normal; }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 6px; padding: 14px 16px;
  margin: 14px 0; min-width: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; margin: 14px 0; }
.pair section { margin: 0; }
.chart { overflow-x: auto; } svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: 12px; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--edge); vertical-align: top; }
tr:last-child td { border-bottom: 0; } .number { text-align: right; white-space: nowrap; }
td.time { white-space: nowrap; } .bad { color: var(--bad); } .warn { color: var(--warn); }
.good { color: var(--good); }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 8px; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { margin: 6px 0 0; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-x: auto; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 760px) { main { padding: 18px 12px 32px; } .pair { grid-template-columns: 1fr; }
  .chart.wide svg { min-width: 680px; } section { padding: 12px; }
  .figures { grid-template-columns: 1fr 1fr; } }
@media print { section { break-inside: avoid; } }
"""
