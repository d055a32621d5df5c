"""The look: calm greys, one teal, the system's own fonts; nothing is fetched from anywhere."""

from __future__ import annotations

import gradio as gr

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace"]


TEAL = gr.themes.Color(  # as Gradio's teal, but a shade darker from 400 on, so that text in it has contrast on white
    name="clm", c50="#eefaf8", c100="#d3f1ec", c200="#a8e2da", c300="#72cbc1", c400="#3aa99e", c500="#0f766e",
    c600="#0d6b64", c700="#0b5f59", c800="#0a4e49", c900="#08403c", c950="#042524",
)  # fmt: skip


def theme() -> gr.themes.Base:
    """Return the theme; the page's own drawings take their colours from page.css."""
    look = gr.themes.Base(
        primary_hue=TEAL, secondary_hue=TEAL, neutral_hue=gr.themes.colors.slate,
        font=FONTS, font_mono=MONO, radius_size=gr.themes.sizes.radius_md, text_size=gr.themes.sizes.text_md,
    )  # fmt: skip
    return look.set(
        body_background_fill="#f4f6f8",
        body_background_fill_dark="#10161b",
        background_fill_secondary_dark="#161d24",
        block_background_fill="#ffffff",
        block_background_fill_dark="#182028",
        block_border_width="1px",
        block_border_color="#dfe5ea",
        block_border_color_dark="#2a353f",
        block_label_text_color="#44535f",
        block_label_text_color_dark="#aebcc7",
        block_title_text_weight="600",
        block_info_text_color="#5d6c78",
        block_info_text_color_dark="#94a3af",
        border_color_primary="#d5dde3",
        border_color_primary_dark="#2f3b46",
        block_title_text_color="#1f2d38",
        block_title_text_color_dark="#dde6ec",
        body_text_color="#1f2d38",
        body_text_color_dark="#dde6ec",
        color_accent="#0f766e",
        input_border_width="1px",
        input_border_color="#c9d3da",
        input_border_color_dark="#34424e",
        button_large_text_size="*text_md",
        button_large_padding="8px 16px",
        input_background_fill="#ffffff",
        input_background_fill_dark="#11181e",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#0b5f59",
        button_primary_background_fill_dark="#0f766e",
        button_primary_background_fill_hover_dark="#14897f",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_dark="#202a33",
        button_secondary_border_color="#c9d3da",
        button_secondary_border_color_dark="#3a4854",
        button_border_width="1px",
        block_shadow="none",
        block_radius="8px",
    )
