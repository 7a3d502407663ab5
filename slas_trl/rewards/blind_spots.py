"""
What each reward measures, and what it cannot see: a policy that is trained on it alone will give that up.

Of rewards by name, see `slas_trl.rewards.NAMES`. docs/source/rewards.md says the same of them.
"""

_PEOPLE = "which picture of a prompt people would prefer"
_PIXELS = "everything else, the prompt included"

MEASURES = {
    "aesthetic": "how beautiful people would find a picture, whatever it shows",
    "brightness": "how bright a picture is",
    "clip_score": "how well a picture fits its prompt, by CLIP",
    "hpsv2": f"{_PEOPLE}, by the model HPSv2",
    "image_reward": f"{_PEOPLE}, by the model ImageReward",
    "incompressibility": "how much detail or noise a picture has, by its size as JPEG",
    "jpeg_compressibility": "how little there is to see in a picture, by its size as JPEG",
    "object_detector": "whether an object detector finds what was asked for: objects, their number, colour and place",
    "ocr": "whether the text in the quotes of a prompt can be read in its picture",
    "pick_score": f"{_PEOPLE}, by the model PickScore",
    "remote": "what a reward on another machine scores",
    "shapes_clip": "how well a picture of shapes fits its prompt, by a small encoder of images and texts",
    "shapes_coloured_area": "how much of a picture is coloured",
    "shapes_verifier": "the share of its prompt's demands that a picture of shapes meets, exactly",
    "shapes_verifier_strict": "whether a picture of shapes meets all of its prompt's demands, exactly",
    "unified_reward": "how well a picture fits its prompt and looks, by a vision-language model",
    "vlm_judge": "whether a picture shows what its prompt says, by a vision-language model",
}

BLIND_SPOTS = {
    "aesthetic": "the prompt, so that it needs another reward beside it",
    "brightness": _PIXELS,
    "clip_score": "counts, left and right, which colour belongs to what; prompts after 77 tokens; what the centre "
    "crop removes",
    "hpsv2": "detail below 224 pixels; has a taste for glossy pictures",
    "image_reward": "prompts after 33 tokens; what the centre crop removes; languages other than English",
    "incompressibility": _PIXELS,
    "jpeg_compressibility": _PIXELS,
    "object_detector": "all but the objects of the detector's classes, and how they are drawn",
    "ocr": "all that is not text; text elsewhere counts only if the right one is misread",
    "pick_score": "what the centre crop removes; detail below 224 pixels",
    "remote": "what the reward on the other machine is blind to",
    "shapes_clip": "what is left of what, mostly which shape has which colour",
    "shapes_coloured_area": _PIXELS,
    "shapes_verifier": "everything outside its world of plain shapes",
    "shapes_verifier_strict": "everything outside its world of plain shapes",
    "unified_reward": "what a 7B model does not see",
    "vlm_judge": "what the judge does not see; mostly near 0 or 1, without log-probabilities only 0 or 1",
}
