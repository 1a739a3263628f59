"""`dual-lora report`: one HTML page that needs nothing else, from studies, analyses and the benchmark ledger.

sources   whether what is named is there
gather    finds and reads the sources, which may come from strangers
blocks    what a page is made of: tables, charts, paragraphs; columns.csv says what a table's keys mean
overview  several studies: the pair that most compare, every question with its answer
studies   a study's results as blocks: verdicts, scores, cost
insights  an analysis as blocks: signs, ranks, gradients, likeness, contribution
ledger    the benchmark ledger as blocks
charts    a chart as Vega-Lite specifications
page      blocks to HTML by a Jinja template (page.html, page.css, page.js and the library in vega/ are put into it)
exports   tables as CSV, Markdown and LaTeX
report    the command: gather, build, write; `watch` does it again when a source changes
"""
