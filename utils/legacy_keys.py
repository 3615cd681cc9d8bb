"""The keys of the released CLIP-SPM configs that differ here, so that such a file loads unchanged."""

# Key -> its replacement. Each is accepted with a warning.
LEGACY_KEYS: dict[str, str] = {
    "TRAIN.CLASS_NAME": "class names come from the split",
    "TEST.CLASS_NAME": "class names come from the split",
    "DATA.SPLIT": "the split is always read from the list03 files in DATA.SPLIT_DIR",
    "DATA.DEBUG_LOADER": "DEBUG makes a short run",
    "DEVICE.NUM_GPUS": "torchrun decides how many GPUs are used",
    "DEVICE.GPU_ID": "CUDA_VISIBLE_DEVICES decides which GPU is used",
    "MODEL.USE_CLASSIFICATION": "MODEL.LOSSES.VIDEO_TEXT or MODEL.VIDEO_TEXT_WEIGHT weighs that loss",
    "MODEL.USE_CLASSIFICATION_VALUE": "MODEL.LOSSES.VIDEO_TEXT or MODEL.VIDEO_TEXT_WEIGHT weighs that loss",
    "MODEL.MOTION_COFF": "MODEL.LOSSES.MOTION replaced it",
    "MODEL.NORMAL_COFF": "MODEL.LOSSES.APPEARANCE replaced it",
    "MODEL.LMD": "MODEL.LOSSES.VIDEO_TEXT, LOCAL and GLOBAL replaced it",
    "MODEL.METRIC": "the method's own options replaced it",
    "MODEL.DROPOUT": "the method's own options replaced it",
    "MODEL.TRANS_LINEAR_OUT_DIM": "the method's own options replaced it",
}

# Printed once for a file with any of these: it loads, but does not repeat the released experiment.
PRESET_HINT = (
    "a config of the released code does not reproduce its results here: the defaults are the clean preset (normalised "
    "pixels, validation on the val classes, queries scored alone); configs/clipspm/released/ has the released settings."
)

# Key -> old value -> new value.
LEGACY_VALUES: dict[str, dict[str, str]] = {
    "DATA.DATASET": {"hmdb": "hmdb51", "ucf": "ucf101", "ssv2": "ssv2_full", "ssv2_cmn": "ssv2_small"},
}
