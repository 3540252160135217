"""Projectors beside stock LLaVA's two layers: taken over from a teacher, fitted, or over a grid."""
