//! Three hosts whose uplinks are joined by switches that flood everything.

use super::*;
use crate::simulate::{Cabling, Network, run};

/// How many frames guests send in each cabling. `simulate::run` takes any number.
const FRAMES: u64 = 100_000;

fn clean(cabling: Cabling) -> Network {
    let mut network = Network::new(cabling, 0x5eed).unwrap();
    let report = network.run(FRAMES);
    assert_eq!(report.sent, FRAMES);
    let bad = (
        report.duplicates,
        report.echoes,
        report.strays,
        report.missing,
    );
    assert_eq!(bad, (0, 0, 0, 0), "{cabling:?} {report:?}");
    assert!(
        report.delivered > FRAMES && report.passages < 40,
        "{report:?}"
    );
    let (rx, forwarded, dropped) = network.totals();
    assert_eq!(rx, forwarded + dropped);
    network
}

#[test]
fn one_uplink_each_has_no_loop() {
    clean(Cabling::Star);
    clean(Cabling::Row);
}

#[test]
fn two_uplinks_in_one_switch_give_no_echo_and_no_duplicate() {
    let network = clean(Cabling::Double);
    for cause in [
        DropCause::Echo,
        DropCause::PassiveUplink,
        DropCause::ReversePath,
    ] {
        assert!(network.dropped(cause) > 0, "{cause:?}");
    }
}

#[test]
fn a_loop_through_every_host_is_none() {
    clean(Cabling::Loop);
}

#[test]
fn a_network_is_the_same_each_time() {
    let report = run(Cabling::Loop, 2_000, 1).unwrap();
    assert_eq!(run(Cabling::Loop, 2_000, 1).unwrap(), report);
}
