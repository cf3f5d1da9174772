"""How stock checkpoints name the weights that ours hold: patterns, and what replaces them.

At most one pattern fits a name; a name that none fits stays.
"""

# Published LLaVA checkpoints hang the decoder with its head, the tower and the projector side by
# side; later ones hang them under `model`. The tower's own names are those of transformers 4.
LLAVA_NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.language_model.",
    r"^vision_tower\.": "model.vision_tower.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
    r"^image_newline$": "model.image_newline",
    r"^model\.vision_tower\.(?!vision_model\.)": "model.vision_tower.vision_model.",
}
