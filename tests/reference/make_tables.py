"""Makes tests/data/tables/: pairs of tests/data/pairs as Parquet and CSV, written by pyarrow, datasets and pandas.

    tests/reference/setup.sh, then .venv/bin/python tests/reference/make_tables.py

Each table holds the rows of the JSON Lines file of the same name, in the layouts in which such sets are published:
lists of messages as lists of structs, texts as strings, numbers and ids beside them.
"""

import json
import shutil
from pathlib import Path

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq

DATA = Path(__file__).resolve().parent.parent / "data"
TABLES = DATA / "tables"


def rows(name):
    lines = (DATA / "pairs" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def ultrafeedback_binarized():
    """As HuggingFaceH4/ultrafeedback_binarized: ids, the chosen conversation again, and scores."""
    for index, row in enumerate(rows("ultrafeedback")):
        yield {
            "prompt": row["prompt"],
            "prompt_id": f"{index:064x}",
            "chosen": row["chosen"],
            "rejected": row["rejected"],
            "messages": row["chosen"],
            "score_chosen": 8.5,
            "score_rejected": float("nan") if index else 4.0,
        }


def leaves_of_text(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    schema = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    columns = [schema.column(place) for place in range(len(schema))]
    return [column for column in columns if column.physical_type == "BYTE_ARRAY"]


def main():
    shutil.rmtree(TABLES, ignore_errors=True)
    TABLES.mkdir()
    binarized = list(ultrafeedback_binarized())
    datasets.Dataset.from_list(binarized).to_parquet(TABLES / "ultrafeedback.parquet")
    (TABLES / "ultrafeedback.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in binarized), encoding="utf-8"
    )
    # Row groups of two rows, each codec that is read, and columns that are no text.
    for name, codec in [("orca", "zstd"), ("text", "gzip"), ("conversational", "none")]:
        table = pa.Table.from_pylist(rows(name))
        embedding = pa.array([[0.5] * 3] * len(table), type=pa.list_(pa.float32()))
        now = pa.array([1_700_000_000_000_000_000] * len(table), type=pa.timestamp("ns"))
        table = table.append_column("embedding", embedding).append_column("time", now)
        pq.write_table(table, TABLES / f"{name}.parquet", compression=codec, row_group_size=2)
    # Texts whose lengths are stored as differences, in pages of both versions.
    for name, version, codec in [("conversational", "2.0", "snappy"), ("text", "1.0", "zstd")]:
        table = pa.Table.from_pylist(rows(name))
        leaves = [column.path for column in leaves_of_text(table)]
        kinds = ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"]
        pq.write_table(
            table,
            TABLES / f"{name}.delta.parquet",
            compression=codec,
            data_page_version=version,
            use_dictionary=False,
            column_encoding={path: kinds[place % 2] for place, path in enumerate(leaves)},
        )
    # Text without the word that it is text, in Latin-1 in the second row; and bytes that nothing reads.
    columns = {
        "prompt": [b"Hi", b"Yes?"],
        "chosen": [b" Hello.", b" caf\xe9"],
        "rejected": [b" No.", b" tea"],
        "digest": [b"\xff\x00", b"\xfe"],
    }
    pq.write_table(pa.table(columns), TABLES / "latin.parquet", store_schema=False)
    for name in ["orca", "text"]:
        pandas.DataFrame(rows(name)).to_csv(TABLES / f"{name}.csv", index=False)
    # A table has no lists: conversations are JSON in its cells.
    as_json = [
        {key: json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value for key, value in row.items()}
        for row in rows("conversational")
    ]
    pandas.DataFrame(as_json).to_csv(TABLES / "conversational.tsv", index=False, sep="\t")


if __name__ == "__main__":
    main()
