"""Devices, the mesh over them, and the layout that assigns dimensions of weights to mesh axes.
Imports `processes`, `presets`, `config`, `records`, `common` and `files`.
"""
