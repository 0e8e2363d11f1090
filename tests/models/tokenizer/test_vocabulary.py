import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.tokenizer.vocabulary import AUTHOR_BUCKETS, TAG_BUCKETS, Catalogue, bucket, disambiguated

ITEMS = pa.table(
    {
        "item_id": ["a", "b", "c"],
        "title": ["Cats", None, None],
        "tags": [["cat"], ["dog", "park"], None],
        "author_id": ["ann", None, "bob"],
        "duration_ms": [1000, 2000, 3000],
    }
)
SIDS = np.array([[0, 1], [2, 3], [0, 1]], np.int32)


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue.from_items(ITEMS, sids=SIDS, codes=4, popularity=np.array([3.0, 1.0, 2.0]))


def test_attributes_of_items(catalogue: Catalogue) -> None:
    assert catalogue.titles == ["Cats", "dog park", "c"]
    assert catalogue.author[1] == 0
    assert catalogue.tag[2] == 0
    assert catalogue.tag[1] == bucket("dog", TAG_BUCKETS)
    assert catalogue.rows(["c", "nobody", "a"]).tolist() == [2, -1, 0]
    assert catalogue.rows([]).dtype == np.int32


NAMES = st.none() | st.sampled_from(["", "a", "b c", "\N{SNOWMAN}"])


@given(st.lists(st.tuples(NAMES, st.none() | st.lists(NAMES.filter(bool), max_size=2), NAMES), max_size=5))
def test_titles_and_buckets_are_those_of_every_item_by_itself(rows: list[tuple]) -> None:
    titles, tags, authors = zip(*rows, strict=True) if rows else ((), (), ())
    ids = [f"i{row}" for row in range(len(rows))]
    items = pa.table(
        {
            "item_id": pa.array(ids, pa.string()),
            "title": pa.array(titles, pa.string()),
            "tags": pa.array(tags, pa.list_(pa.string())),
            "author_id": pa.array(authors, pa.string()),
            "duration_ms": pa.array([1] * len(ids), pa.int64()),
        }
    )
    found = Catalogue.from_items(items, sids=np.zeros((len(ids), 1), np.int32), codes=1)
    each = zip(titles, tags, ids, strict=True)
    assert found.titles == [title or " ".join(names or ()) or item for title, names, item in each]
    assert found.author.tolist() == [bucket(name or "", AUTHOR_BUCKETS) for name in authors]
    assert found.tag.tolist() == [bucket(names[0] if names else "", TAG_BUCKETS) for names in tags]


@given(st.text())
def test_bucket_is_stable_and_leaves_zero_to_the_unknown(name: str) -> None:
    assert bucket(name, AUTHOR_BUCKETS) == bucket(name, AUTHOR_BUCKETS)
    assert (bucket(name, TAG_BUCKETS) == 0) == (name == "")
    assert bucket(name, TAG_BUCKETS) < TAG_BUCKETS


def test_bucket_does_not_change_between_releases() -> None:
    assert [bucket(name, AUTHOR_BUCKETS) for name in ("ann", "bob")] == [1662, 1128]


def test_append_keeps_rows_and_sids(catalogue: Catalogue) -> None:
    new = pa.table({"item_id": ["d"], "author_id": ["ann"], "duration_ms": [5]})
    longer = catalogue.append(new, np.array([[3, 3]]))
    assert longer.item_ids == ["a", "b", "c", "d"]
    assert (longer.sids[:3] == catalogue.sids).all()
    assert longer.author[3] == longer.author[0]
    assert len(catalogue) == 3
    assert longer.append(new.slice(0, 0), np.zeros((0, 2))) is longer


def test_append_refuses_known_items_and_other_lengths(catalogue: Catalogue) -> None:
    with pytest.raises(ValueError, match="'b'; append only new ones"):
        catalogue.append(ITEMS.slice(1, 1), np.array([[0, 0]]))
    with pytest.raises(ValueError, match="3 levels; this catalogue has 2"):
        catalogue.append(pa.table({"item_id": ["d"], "duration_ms": [5]}), np.array([[0, 0, 0]]))


def test_tables_round_trip_through_parquet(catalogue: Catalogue, tmp_path) -> None:
    for name, table in zip(("sids", "items"), catalogue.to_tables(), strict=True):
        pq.write_table(table, tmp_path / name)
    read = Catalogue.from_tables(pq.read_table(tmp_path / "sids"), pq.read_table(tmp_path / "items"))
    assert read.item_ids == catalogue.item_ids
    assert read.titles == catalogue.titles
    assert read.codes == catalogue.codes
    for name in ("sids", "author", "tag", "duration_ms", "popularity"):
        assert (getattr(read, name) == getattr(catalogue, name)).all(), name
    again = read.to_tables()
    assert all(a.equals(b) for a, b in zip(again, catalogue.to_tables(), strict=True))


def test_tables_of_a_slice_and_of_nothing(catalogue: Catalogue) -> None:
    sids, items = catalogue.to_tables()
    assert Catalogue.from_tables(sids.slice(1), items.slice(1)).sids.tolist() == [[2, 3], [0, 1]]
    assert Catalogue.from_tables(sids.slice(3), items.slice(3)).levels == 2


def test_tables_of_two_catalogues_are_refused(catalogue: Catalogue) -> None:
    sids, items = catalogue.to_tables()
    with pytest.raises(ValueError, match="differ in their ids"):
        Catalogue.from_tables(sids.slice(0, 2), items)
    with pytest.raises(ValueError, match="to_tables"):
        Catalogue.from_tables(sids.replace_schema_metadata(None), items)


@pytest.mark.parametrize(
    ("sids", "message"),
    [
        (np.array([[0, 1], [2, 4], [0, 1]]), r"span 0\.\.4; expected 0\.\.3"),
        (np.array([[0, 1]]), "3 item ids"),
        (np.array([0, 1, 2]), "expected int32"),
    ],
)
def test_sids_that_do_not_fit_are_refused(sids: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Catalogue.from_items(ITEMS, sids=sids, codes=4)


def test_repeated_items_are_refused() -> None:
    with pytest.raises(ValueError, match="repeated"):
        Catalogue.from_items(pa.concat_tables([ITEMS, ITEMS]), sids=np.tile(SIDS, (2, 1)), codes=4)


def test_a_sid_names_a_list_of_items(catalogue: Catalogue) -> None:
    assert catalogue.items_of([0, 1]) == ["a", "c"]
    assert catalogue.items_of(np.array([2, 3])) == ["b"]
    assert catalogue.items_of([3, 3]) == []


def test_sids_of_another_codebook_are_refused(catalogue: Catalogue, tmp_path) -> None:
    versioned = Catalogue.from_items(ITEMS, sids=SIDS, codes=4, codebook="aaa")
    new, sid = pa.table({"item_id": ["d"], "duration_ms": [5]}), np.array([[3, 3]])
    assert versioned.append(new, sid, codebook="aaa").codebook == "aaa"
    with pytest.raises(ValueError, match="codebook bbb, this catalogue's from aaa"):
        versioned.append(new, sid, codebook="bbb")
    assert Catalogue.from_tables(*versioned.to_tables()).codebook == "aaa"
    assert catalogue.append(new, sid, codebook="bbb").codebook == ""


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30), st.integers(0, 30))
def test_a_disambiguation_level_tells_all_items_apart_and_never_renumbers(sids, cut: int) -> None:
    table = np.array(sids, np.int32).reshape(-1, 2)
    first = disambiguated(table[:cut], 32)
    both = np.concatenate([first, disambiguated(table[cut:], 32, taken=first)])
    assert (both[:, :2] == table).all()
    assert len(np.unique(both, axis=0)) == len(table)
    assert (both == disambiguated(table, 32)).all()


def test_too_many_items_of_one_sid_are_refused() -> None:
    with pytest.raises(ValueError, match="names 5 items and a level has 4 codes"):
        disambiguated(np.zeros((5, 2), np.int32), 4)
