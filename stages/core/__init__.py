"""What the stages are made of: a package for each stage, which shares its name, and a few that stages share.

A package imports only what stands to the right of its arrow (tests/pipeline/test_packages.py holds the imports to it).
Read it from below: each line needs only lines below it, so there is no circle.

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
