"""How models come wrapped: pipelines of diffusers, patchers of ComfyUI. Integrations translate, they decide nothing."""
