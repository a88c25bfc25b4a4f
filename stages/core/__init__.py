"""The implementation: a package for each stage, which shares its name, and a few that stages share.

A package imports only those to the right of its arrow (tests/pipeline/test_packages.py enforces it).
Each line needs only lines below it, so there are no cycles.

    rehearse  -> preview finetune load cli sharding processes presets config records common files
    preview   -> plan sharding fetch presets config cli records common
    plan      -> finetune load model tokenize sharding fetch presets config records common files
    export    -> quantize evaluate fetch load tokenize presets config records common files
    cache     -> finetune
    quantize  -> load model sharding presets records common
    finetune  -> adapters generate load model tokenize sharding processes presets config records common files
    evaluate  -> generate model tokenize sharding presets records common files
    generate  -> adapters load model tokenize sharding presets config records common
    adapters  -> load presets records common files
    model     -> sharding presets common
    load      -> sharding processes presets records common files
    prepare   -> fetch presets config records common files
    fetch     -> presets records common files
    tokenize  -> sharding presets config common files
    sharding  -> processes presets config records common files
    presets   -> records common
    report    -> config records common
    cli       -> processes config records common files
    config    -> records common
    records   -> common files
    processes -> common files
    common    -> files
    files     ->
"""

# JAX and Keras read the environment when they are imported, which only modules of this package do.
import stages.core.common.environment  # noqa: F401
