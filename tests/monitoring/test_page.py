import plotly.graph_objects as go

from monitoring.page import page, plots


def test_sections_without_a_figure_are_left_out_and_texts_are_escaped() -> None:
    body = plots([("A & B", go.Figure(), "<note>"), ("Nothing", None, "")], {"height": 300})
    assert body.count("plotly-graph-div") == 1
    assert "A &amp; B" in body
    assert "&lt;note&gt;" in body
    assert "Nothing" not in body
    assert '"height":300' in body


def test_equal_input_is_an_equal_page_with_one_script() -> None:
    first, second = (page("<title>", plots([("A", go.Figure(), ""), ("B", go.Figure(), "")], {})) for _ in range(2))
    assert first == second
    assert "&lt;title&gt;" in first
    assert first.count("plotly.js v") == page("", "").count("plotly.js v") > 0
