"""`dual-lora report`: one HTML page that needs nothing else, from studies, analyses and the benchmark ledger.

gather    finds and reads the sources
blocks    what a page is made of: tables, charts, paragraphs
overview  several studies: the pair that most compare, every question with its answer
studies   a study's results as blocks: verdicts, scores, cost
insights  an analysis as blocks: signs, ranks, gradients, likeness, contribution
ledger    the benchmark ledger as blocks
page      blocks to HTML (page.css and page.js are put into it)
exports   tables as CSV, Markdown and LaTeX
report    the command: gather, build, write; `watch` does it again when a source changes
"""
