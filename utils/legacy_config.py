"""Keys and values of the published CLIP-SPM configs that mean something else here, or nothing any more."""

# Key -> what replaced it. Each is accepted with a warning, so that a published file loads as it is.
LEGACY_KEYS: dict[str, str] = {
    "TRAIN.CLASS_NAME": "class names come from the split",
    "TEST.CLASS_NAME": "class names come from the split",
    "DATA.SPLIT": "the split is always read from the list03 files in DATA.SPLIT_DIR",
    "DATA.DEBUG_LOADER": "DEBUG makes a short run",
    "DEVICE.NUM_GPUS": "torchrun decides how many GPUs are used",
    "DEVICE.GPU_ID": "CUDA_VISIBLE_DEVICES decides which GPU is used",
    "MODEL.METRIC": "the method's own options replaced it",
    "MODEL.DROPOUT": "the method's own options replaced it",
    "MODEL.TRANS_LINEAR_OUT_DIM": "the method's own options replaced it",
}

# Key -> old value -> new value.
LEGACY_VALUES: dict[str, dict[str, str]] = {
    "DATA.DATASET": {"hmdb": "hmdb51", "ucf": "ucf101", "ssv2": "ssv2_full", "ssv2_cmn": "ssv2_small"},
}
