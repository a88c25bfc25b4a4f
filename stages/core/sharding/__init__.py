"""Devices, the mesh over them, and the layout that says which dimension of which weight lies on which axis.
Imports `presets` (the architecture), `config`, `files` and `common`.
"""
