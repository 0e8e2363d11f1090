"""Grafana dashboards as code: ``python -m monitoring.dashboards`` writes the JSON files beside this one.

The JSON is committed, so that a chart or a person imports it without Python; a test holds it equal to the code.
"""
