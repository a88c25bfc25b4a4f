"""What every package needs and no result depends on: errors, paths, progress, the filter that keeps secrets off the
screen, and the list of the code that results do depend on. Imports no other package.
"""
