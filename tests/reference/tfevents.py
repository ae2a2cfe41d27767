"""Golden bytes and reading test of TensorBoard event files, by TensorBoard's own code.

    pip install tensorboard==2.21.0
    python tests/reference/tfevents.py golden          prints the records that src/report/tensorboard.rs must write
    python tests/reference/tfevents.py read FOLDER     prints the scalars of a run's event files, a JSON line each
"""

import io
import json
import sys

from tensorboard.backend.event_processing import event_accumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


def record(event: Event) -> str:
    stream = io.BytesIO()
    RecordWriter(stream).write(event.SerializeToString())
    return stream.getvalue().hex()


def golden() -> None:
    print("version", record(Event(wall_time=1.5, file_version="brain.Event:2")))
    values = [
        Summary.Value(tag="loss", simple_value=0.25),
        Summary.Value(tag="rewards/chosen", simple_value=-3.0),
    ]
    print("scalars", record(Event(wall_time=2.5, step=300, summary=Summary(value=values))))


def read(folder: str) -> None:
    events = event_accumulator.EventAccumulator(folder, size_guidance={"scalars": 0})
    events.Reload()
    for tag in sorted(events.Tags()["scalars"]):
        points = [[event.step, event.value] for event in events.Scalars(tag)]
        print(json.dumps({"tag": tag, "points": points}))


if __name__ == "__main__":
    if sys.argv[1:] == ["golden"]:
        golden()
    elif len(sys.argv) == 3 and sys.argv[1] == "read":
        read(sys.argv[2])
    else:
        sys.exit(__doc__)
