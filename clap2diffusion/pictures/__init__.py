"""From an adapter to pictures: export to stock diffusers, pipelines, sound algebra, heat maps, sheets."""
