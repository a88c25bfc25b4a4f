"""Replaces the package if a stage is run as a file: `python stages/prepare.py`.

Python then puts that file's folder first on its path, so that `stages` is this folder. Other packages would also find
our `tokenize` and `profile` where they want Python's own.
"""

import os.path
import sys

_folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
sys.path[:] = [os.path.dirname(_folder) if path == _folder else path for path in sys.path]  # noqa: PTH120
del sys.modules["stages"]
import stages  # noqa: E402, F401
