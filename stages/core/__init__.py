"""Small modules, one subject each: the file is what DVC invalidates."""
