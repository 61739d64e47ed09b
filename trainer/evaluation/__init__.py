"""Evaluation of trained models: metrics of samples, plots, reports and studies."""
