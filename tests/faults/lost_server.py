"""kill -9 of the tracking server at random instants of a flow; it comes back after a while on the same store.

    python -m tests.faults.lost_server [--outages 5] [--outage 60] [--seed 0]

The flow must not notice: it finishes, every step executed and recorded once, one version, one alias each.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from pipeline.workflow.tracking import Tracking
from tests.faults.race_drivers import Driver, check
from tests.faults.tracking_server import TrackingServer
from tests.tiny_model import make_tiny_model

STEP_SECONDS = 0.3


def main() -> None:
    """Run one flow an outage, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outages", type=int, default=5)
    parser.add_argument("--outage", type=float, default=60.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="lost") as name, TrackingServer(Path(name) / "server") as server:
        folder, tracking = Path(name), Tracking(server.uri)
        for record in make_tiny_model(folder):
            (folder / f"{type(record).__name__}.json").write_text(record.to_json())
        driver = Driver(folder, server.uri, {}, 0)
        try:
            driver.expect("READY")
            begun = time.monotonic()
            driver.ask(f"undisturbed 0 {STEP_SECONDS} 0")
            check(folder, tracking, "undisturbed", {driver.expect("ENDED")}, promoted=False)
            undisturbed = time.monotonic() - begun
            print(f"undisturbed: {undisturbed:.1f} s", flush=True)
            for number in range(options.outages):
                begun = time.monotonic()
                driver.ask(f"lost-{number} 0 {STEP_SECONDS} 0")
                # The later half of the first flow went with imports; the next ones are quicker.
                moment = rng.uniform(0, 0.7 * undisturbed)
                time.sleep(moment)
                server.kill()
                time.sleep(options.outage)
                server.start()
                check(folder, tracking, f"lost-{number}", {driver.expect("ENDED")}, promoted=False)
                print(
                    f"lost-{number}: killed after {moment:.2f} s for {options.outage:.0f} s: "
                    f"finished after {time.monotonic() - begun:.1f} s, everything done once",
                    flush=True,
                )
        finally:
            driver.end()
    print(f"{options.outages} outages of {options.outage:.0f} s, every flow finished, every step executed once")


if __name__ == "__main__":
    main()
