"""`specstream bench`: timings are ratios taken in one run, interleaved, beside mlx-lm itself.

| file | the idea it holds |
|---|---|
| `session.py` | a benchmark as a person sees it: an estimate, progress, an end |
| `options.py` | the words of the command line, and the methods they describe |
| `methods.py` | what competes: ways of decoding the same model |
| `competitors.py` | one model in memory, with all streams and decoders around it |
| `cases.py` | prompts with categories, from files or built in |
| `run.py` | the loop: every prompt by every method, a few tokens of each in turns |
| `measure.py` | one answer, timed |
| `result.py` | the result as a JSON file |
| `summary.py` | medians and spread per category and method |
| `report.py` | figures in words and tables |
| `plots.py` | figures as PNG files |
| `plot_style.py` | how all plots look |
| `roofline.py` | how many rows are nearly free here |
| `trees.py` | the planner in a benchmark: its costs, its choice, every small tree beside it |
| `planner_check.py` | predicted against measured tokens per second, tree by tree |
| `planner_report.py` | what the planner knows, for people and as JSON |
"""
