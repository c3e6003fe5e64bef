"""The style sheet of ``report.html``. Colours are variables, so that the figures follow the theme as the text does."""

PAGE_STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f6f8fa; --ink: #24292f; --muted: #667080; --rule: #d5dae0; --accent: #0072b2;
  --caution: #fff6e0; --caution-edge: #e69f00;
  --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73;
  --series-3: #8a2be2; --series-4: #60280a; --series-5: #324345;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181d; --card: #1c2229; --ink: #e4e8ec; --muted: #98a3b0; --rule: #363e48; --accent: #6cb8ea;
    --caution: #2d2616; --caution-edge: #e69f00;
    --series-0: #3d9fdc; --series-1: #f0803c; --series-2: #2cc295;
    --series-3: #b44dff; --series-4: #fed009; --series-5: #e0e4e8;
  }
}
@media print {
  :root { color-scheme: light; --page: #ffffff; --card: #ffffff; --ink: #000000; --muted: #444444; --rule: #bbb; }
  section { break-inside: avoid-page; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 72rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
header { border-bottom: 1px solid var(--rule); margin-bottom: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0 0.25rem; overflow-wrap: anywhere; }
header p { color: var(--muted); margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.4rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; margin: 0.5rem 0; }
li { margin: 0.25rem 0; }
.caution {
  background: var(--caution); border-left: 4px solid var(--caution-edge); border-radius: 4px;
  padding: 0.6rem 1rem; margin: 1rem 0;
}
.caution h3 { margin: 0; }
.scroll { overflow-x: auto; margin: 1rem 0 0.4rem; border: 1px solid var(--rule); border-radius: 6px; }
.scroll:focus-visible, pre:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.92rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.6rem 0.8rem; }
th, td { padding: 0.45rem 0.8rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--rule); }
thead th { color: var(--muted); font-weight: 600; background: var(--card); vertical-align: bottom;
  white-space: normal; }
th:first-child {
  text-align: left; position: sticky; left: 0; background: var(--page);
  white-space: normal; min-width: 7rem; max-width: 16rem; overflow-wrap: anywhere;
}
thead th:first-child { background: var(--card); }
tbody th { font-weight: 600; }
.note { color: var(--muted); font-size: 0.88rem; margin: 0.3rem 0 1rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.25rem; }
figure { margin: 0.75rem 0; padding: 0.75rem; background: var(--card); border-radius: 6px; max-width: 40rem; }
figcaption { color: var(--muted); font-size: 0.82rem; padding: 0.3rem 0.2rem 0; }
figure svg { display: block; width: 100%; height: auto; }
.formula {
  font-family: ui-monospace, "Liberation Mono", monospace; background: var(--card);
  padding: 0.6rem 0.9rem; border-radius: 6px; max-width: none; white-space: pre-wrap;
}
pre { background: var(--card); padding: 0.75rem 1rem; border-radius: 6px; overflow-x: auto; font-size: 0.88rem; }
dl {
  display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: 0.2rem 1.2rem; margin: 0.3rem 0;
  font-size: 0.92rem;
}
dt { color: var(--muted); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media (max-width: 34rem) {
  body { padding: 1rem 0.9rem 3rem; }
  figure { padding: 0.4rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 0.5rem; }
}
"""
