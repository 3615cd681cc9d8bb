"""Identifies the variant of a benchmark's lists, since scores on different variants are not comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from episodes.preparation.raw_lists import ListedVideo

Lists = Mapping[str, Sequence[ListedVideo]]

# Number of videos of the two train lists of Something-Something V2, full, that are in use -> description.
SSV2_FULL_TRAIN_LISTS = {
    77500: "train list of 77,500 videos, as in CLIP-SPM and CLIP-MEI",
    67013: "train list of 67,013 videos, as in TRX, CLIP-FSAR and MoLo",
}

# Kinetics: HyRSM, MoLo and CLIP-FSAR replaced 57 of CMN's test videos, which YouTube had lost. Of three classes
# (blasting sand, busking, cutting watermelon) these are all videos that only one of the two test lists has.
KINETICS_TEST_VIDEOS = 2400
CMN_ONLY = frozenset({
    "X2um9LUaSBA", "fCu_1vOUzTU", "bzAr6Uxzm6U", "kA6pBBwSVQk", "1J8gJLQZBjs", "FebIF4lwX5Q", "Q8rTGlxVE2k",
    "T79DV-zGyqE", "V2K3noLLaJk", "XhJTRY_Naqg", "f4IgTnhmaEk",
})  # fmt: skip
HYRSM_ONLY = frozenset({
    "ngQF39HZ84k", "tdQLZpkyASQ", "zGZCJxV7U8s", "L-ZrsZlAdIE", "GMU6xsYRLd4", "c5b_R6j4B9Q", "pqXHavQ-8rI",
    "488WeEkrWbY", "oMZCheHF6c0", "kwAocgK86CQ", "7VJ1ZHb0Jmc",
})  # fmt: skip
CMN = "test list of CMN, 2,400 videos, as in TRX and CLIP-SPM"
HYRSM = "test list of HyRSM, MoLo and CLIP-FSAR, 2,400 videos, 57 of which differ from CMN's"
YOUTUBE_ID = 11  # characters


def variant_of(layout: str, lists: Lists | None) -> str:
    """Returns the name of the known variant; "" if the benchmark has only one or the lists are unknown."""
    if lists is None:
        return ""
    if layout == "ssv2_full":
        return SSV2_FULL_TRAIN_LISTS.get(len(lists["train"]), "")
    if layout == "kinetics" and len(lists["test"]) == KINETICS_TEST_VIDEOS:
        cmn, hyrsm = _distinctive_videos(lists)
        if cmn == len(CMN_ONLY) and hyrsm == 0:
            return CMN
        if hyrsm == len(HYRSM_ONLY) and cmn == 0:
            return HYRSM
    return ""


def notes_of(layout: str, lists: Lists | None) -> tuple[str, ...]:
    """Returns a sentence on lists that are not a known variant."""
    if lists is None or variant_of(layout, lists):
        return ()
    if layout == "ssv2_full":
        known = " nor ".join(f"{number:,}" for number in SSV2_FULL_TRAIN_LISTS)
        return (f"train list of {len(lists['train']):,} videos, which is neither {known}",)
    if layout == "kinetics":
        cmn, hyrsm = _distinctive_videos(lists)
        return (
            f"test list of {len(lists['test']):,} videos, neither CMN's nor that of HyRSM and CLIP-FSAR: it has "
            f"{cmn} of {len(CMN_ONLY)} videos that only CMN's has, and {hyrsm} of {len(HYRSM_ONLY)} that only "
            "HyRSM's has",
        )
    return ()


def _distinctive_videos(lists: Lists) -> tuple[int, int]:
    """Returns the number of test videos that only CMN's list has, and that only HyRSM's has."""
    ids = {video.name[:YOUTUBE_ID] for video in lists["test"]}
    return len(ids & CMN_ONLY), len(ids & HYRSM_ONLY)
