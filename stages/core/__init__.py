"""The implementation: a package for each stage, which shares its name, and a few that stages share.

A package imports only those to the right of its arrow (tests/pipeline/test_packages.py enforces it).
Each line needs only lines below it, so there are no cycles.

    plan      -> finetune load model tokenize sharding fetch presets records config cli common files
    cache     -> finetune
    finetune  -> generate load model tokenize sharding presets config common files
    generate  -> model tokenize presets
    evaluate  -> tokenize sharding common files
    model     -> sharding presets common
    load      -> sharding presets common files
    prepare   -> fetch presets config common files
    fetch     -> presets common files
    tokenize  -> sharding presets config common files
    sharding  -> presets config common files
    presets   -> common files
    report    -> records config common
    records   ->
    cli       -> config common files
    config    -> common
    common    -> files
    files     ->
"""
