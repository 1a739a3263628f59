"""What else might save time or memory, measured next to the present code: one file a family of ideas.

What pays goes into `core/`; what does not stays here as a measurement that can be repeated, with its figures in
`docs/performance-notes.md`.
"""
