"""Many runs for one question: which method is better, and how sure can we be?

study        what is asked (the YAML file's fields); search what is tuned; read out of a file; shipped/ the shipped ones
plan         its cells: methods checked, ranks solved (budget), test records kept apart; cell the runs of a cell
job          one run: what to do, what came of it, the files that hold it
perform      does one run (interventions, use_cost); execute does many, here, in processes or on Ray
folder       what the study's folder knows: the plan and its amendments; compare runs the whole study in it
results      from outcomes to results.json (rows: its types): metrics, statistics, verdicts (the rule), conclude (what
             may be said), notes
rejudge      judges a results.json again
"""
