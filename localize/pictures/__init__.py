"""Plans and memory as SVG."""
