//! Every command of the control queue, done and refused, and the filters that come of them.

use super::*;

const OK: u8 = 0;
const ERR: u8 = 1;

/// Memory that no buffer is in.
const SPARE: u64 = 0x1000;

const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 7];
const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];
const ALL_STATIONS: [u8; 6] = [0xff; 6];

/// Which of own address, another one, a group and all stations the driver gets frames for.
fn heard(guest: &mut Guest) -> [bool; 4] {
    guest.stock(0, 4, 2048);
    let heard = [MAC, OTHER, GROUP, ALL_STATIONS].map(|to| match guest.hear(&frame_to(to, 60)) {
        Ok(()) => true,
        Err(ReceiveDrop::Address) => false,
        Err(other) => panic!("{other}"),
    });
    guest.settle();
    guest.received(0);
    heard
}

fn table(unicast: &[[u8; 6]], multicast: &[[u8; 6]]) -> Vec<u8> {
    let part = |list: &[[u8; 6]]| [&(list.len() as u32).to_le_bytes()[..], &list.concat()].concat();
    [part(unicast), part(multicast)].concat()
}

#[test]
fn receive_modes() {
    const OWN: [bool; 4] = [true, false, false, true];
    for (commands, want) in [
        (&[][..], OWN),
        (&[(0, 1)], [true; 4]),
        (&[(0, 1), (0, 0)], OWN),
        (&[(1, 1)], [true, false, true, true]),
        (&[(2, 1)], [true, true, false, true]),
        (&[(3, 1)], OWN),
        (&[(1, 1), (3, 1)], OWN),
        (&[(4, 1)], [false, false, false, true]),
        (&[(2, 1), (4, 1)], [false, false, false, true]),
        (&[(5, 1)], [true, false, false, false]),
        (&[(1, 1), (5, 1)], [true, false, true, false]),
        // Promiscuous is above all others.
        (&[(3, 1), (4, 1), (5, 1), (0, 1)], [true; 4]),
        (&[(3, 1), (4, 1), (5, 1)], [false; 4]),
    ] {
        let mut guest = Guest::new(EVERYTHING);
        for &(command, on) in commands {
            assert_eq!(guest.command(0, command, &[on]), OK);
        }
        assert_eq!(heard(&mut guest), want, "{commands:?}");
    }
}

#[test]
fn address_tables() {
    let mut guest = Guest::new(EVERYTHING);
    assert_eq!(guest.command(1, 0, &table(&[OTHER], &[GROUP])), OK);
    assert_eq!(heard(&mut guest), [true; 4]);
    // Refused as a whole, the table stays.
    for bad in [
        table(&[], &[OTHER]),
        table(&[GROUP], &[]),
        table(&[OTHER], &[GROUP])[..12].to_vec(),
        table(&[OTHER], &[GROUP])[..19].to_vec(),
        u32::MAX.to_le_bytes().to_vec(),
        [&[0; 4][..], &u32::MAX.to_le_bytes()].concat(),
        vec![],
    ] {
        assert_eq!(guest.command(1, 0, &bad), ERR, "{bad:?}");
        assert_eq!(heard(&mut guest), [true; 4]);
    }
    assert_eq!(guest.command(1, 0, &table(&[], &[])), OK);
    assert_eq!(heard(&mut guest), [true, false, false, true]);
    // More than fit: all of that kind.
    assert_eq!(guest.command(1, 0, &table(&[[2; 6]; 65], &[])), OK);
    assert_eq!(heard(&mut guest), [true, true, false, true]);
    assert_eq!(
        guest.command(1, 0, &table(&[[2; 6]; 64], &[[1; 6]; 65])),
        OK
    );
    assert_eq!(heard(&mut guest), [true, false, true, true]);
    // A reset empties it.
    guest.net.reset();
    assert!(guest.device().state.settings == Settings::new(0, MAC));
}

#[test]
fn the_switch_hears_what_it_is_to_grant() {
    let mut guest = Guest::new(EVERYTHING);
    let asked = |guest: &mut Guest| {
        let any = guest.net.take_asked();
        any.then(|| guest.device().take_asked())
    };
    let wants = |mac, promiscuous| Some(Asked { mac, promiscuous });
    assert_eq!(asked(&mut guest), None);
    guest.command(1, 1, &OTHER);
    assert_eq!(asked(&mut guest), wants(Some(OTHER), None));
    assert_eq!(asked(&mut guest), None);
    guest.command(0, 0, &[1]);
    assert_eq!(asked(&mut guest), wants(None, Some(true)));
    // All multicasts are nothing to ask for.
    guest.command(0, 1, &[1]);
    assert_eq!(asked(&mut guest), None);
    guest.net.reset();
    assert_eq!(asked(&mut guest), wants(Some(MAC), Some(false)));
    guest.net.reset();
    assert_eq!(asked(&mut guest), None);
}

#[test]
fn an_address_that_is_fixed_is_asked_for_in_vain() {
    let mut guest = Guest::new(EVERYTHING);
    guest.device().config.mac_change = false;
    assert_eq!(guest.command(1, 1, &OTHER), ERR);
    assert_eq!(guest.device().mac(), MAC);
    // The switch counts it.
    assert!(guest.net.take_asked());
    assert_eq!(guest.device().take_asked().mac, Some(OTHER));
    assert_eq!(guest.command(1, 1, &MAC), OK);
}

#[test]
fn own_address() {
    let mut guest = Guest::new(EVERYTHING);
    for (mac, want) in [
        (&GROUP[..], ERR),
        (&[0; 6], ERR),
        (&OTHER[..5], ERR),
        (&OTHER, OK),
    ] {
        assert_eq!(guest.command(1, 1, mac), want);
    }
    let mut mac = [0; 6];
    guest.net.read_config(0, &mut mac);
    assert_eq!((mac, guest.device().mac()), (OTHER, OTHER));
    assert_eq!(heard(&mut guest), [false, true, false, true]);
    guest.net.reset();
    assert_eq!(guest.device().mac(), MAC);
    // A driver that took no address has one that the device does not know.
    let mut guest = Guest::new(EVERYTHING & !feature::MAC);
    assert_eq!(heard(&mut guest), [true, true, false, true]);
}

#[test]
fn vlan_filter() {
    let tagged = |id: u16| {
        let mut frame = frame_to(MAC, 60);
        frame.splice(12..12, [0x81, 0, 0x20 | (id >> 8) as u8, id as u8]);
        frame
    };
    let hears = |guest: &mut Guest, id| {
        guest.stock(0, 1, 2048);
        match guest.hear(&tagged(id)) {
            Ok(()) => true,
            Err(ReceiveDrop::Vlan) => false,
            Err(other) => panic!("{other}"),
        }
    };
    let mut guest = Guest::new(EVERYTHING & !feature::CTRL_VLAN);
    assert!(hears(&mut guest, 9), "all, if not negotiated");
    assert_eq!(guest.command(2, 0, &[9, 0]), ERR);

    let mut guest = Guest::new(EVERYTHING);
    assert!(!hears(&mut guest, 9) && hears(&mut guest, 0));
    for id in [1u16, 9, 64, 4095] {
        assert_eq!(guest.command(2, 0, &id.to_le_bytes()), OK);
        assert!(hears(&mut guest, id) && !hears(&mut guest, id ^ 2));
        assert_eq!(guest.command(2, 1, &id.to_le_bytes()), OK);
        assert!(!hears(&mut guest, id));
    }
    assert_eq!(guest.command(2, 0, &4096u16.to_le_bytes()), ERR);
    assert_eq!(guest.command(2, 0, &[9]), ERR);
    assert_eq!(guest.command(2, 2, &[9, 0]), ERR);
    assert_eq!(guest.device().counters().in_dropped(ReceiveDrop::Vlan), 9);
    assert_eq!(guest.command(0, 0, &[1]), OK);
    assert!(hears(&mut guest, 9), "promiscuous");
}

#[test]
fn announcing() {
    let mut guest = Guest::new(EVERYTHING);
    guest.net.take_signals();
    assert_eq!(guest.status(), 1);
    guest.device().announce();
    assert!(guest.net.has_signals() && guest.net.take_signals().config);
    assert_eq!(guest.status(), 3);
    assert_eq!(guest.command(3, 1, &[]), ERR);
    assert_eq!(guest.status(), 3);
    assert_eq!(guest.command(3, 0, &[]), OK);
    assert_eq!(guest.status(), 1);
    // Who cannot is not asked, nor who has no link.
    let mut guest = Guest::new(EVERYTHING & !feature::GUEST_ANNOUNCE);
    guest.device().announce();
    assert_eq!(
        (guest.status(), guest.net.take_signals().config),
        (1, false)
    );
    assert_eq!(guest.command(3, 0, &[]), ERR);
    let mut guest = Guest::new(EVERYTHING);
    guest.device().set_link(false);
    guest.device().announce();
    assert_eq!(guest.status(), 0);
}

#[test]
fn pairs() {
    let config = NetConfig {
        pairs: 4,
        ..NetConfig::new(MAC)
    };
    let mut guest = Guest::with(config, EVERYTHING | feature::MQ);
    for (data, want) in [
        (&[2, 0][..], OK),
        (&[4, 0], OK),
        (&[0, 0], ERR),
        (&[5, 0], ERR),
        (&[2], ERR),
    ] {
        assert_eq!(guest.command(4, 0, data), want);
    }
    assert_eq!(guest.device().state.settings.pairs, 4);
    assert_eq!(
        guest.command(4, 1, &[0; 64]),
        ERR,
        "receive-side scaling is not offered"
    );
    let mut guest = Guest::with(config, EVERYTHING);
    assert_eq!(guest.command(4, 0, &[2, 0]), ERR);
    assert_eq!(guest.device().control_queue(), 2);
}

#[test]
fn guest_offloads() {
    let mut guest = Guest::new(EVERYTHING & !feature::GUEST_USO4);
    let offloads = |guest: &Guest| guest.device().state.settings.offloads;
    let all = feature::GUEST_OFFLOADS & !feature::GUEST_USO4;
    assert_eq!(offloads(&guest), all);
    for (bits, want) in [
        (0, OK),
        (feature::GUEST_CSUM, OK),
        (feature::GUEST_CSUM | feature::GUEST_USO4, ERR),
        (feature::GUEST_CSUM | feature::CSUM, ERR),
        (u64::MAX, ERR),
        (all, OK),
    ] {
        let before = offloads(&guest);
        assert_eq!(guest.command(5, 0, &bits.to_le_bytes()), want);
        assert_eq!(offloads(&guest), if want == OK { bits } else { before });
    }
    assert_eq!(guest.command(5, 0, &[0; 7]), ERR);
    assert_eq!(guest.command(5, 1, &[0; 8]), ERR);
    let mut guest = Guest::new(EVERYTHING & !feature::CTRL_GUEST_OFFLOADS);
    assert_eq!(guest.command(5, 0, &[0; 8]), ERR);
}

#[test]
fn what_is_not_negotiated_or_known_is_refused() {
    let bare = features::VERSION_1 | feature::CTRL_VQ | feature::MAC | feature::STATUS;
    for (class, command, feature) in [
        (0, 0, feature::CTRL_RX),
        (0, 1, feature::CTRL_RX),
        (0, 2, feature::CTRL_RX_EXTRA),
        (0, 3, feature::CTRL_RX_EXTRA),
        (0, 4, feature::CTRL_RX_EXTRA),
        (0, 5, feature::CTRL_RX_EXTRA),
        (1, 0, feature::CTRL_RX),
        (1, 1, feature::CTRL_MAC_ADDR),
        (2, 0, feature::CTRL_VLAN),
        (2, 1, feature::CTRL_VLAN),
        (3, 0, feature::GUEST_ANNOUNCE),
        (5, 0, feature::CTRL_GUEST_OFFLOADS),
    ] {
        let data = match (class, command) {
            (1, 0) => table(&[], &[]),
            (1, 1) => MAC.to_vec(),
            (5, 0) => vec![0; 8],
            _ => vec![1, 0],
        };
        assert_eq!(Guest::new(bare).command(class, command, &data), ERR);
        assert_eq!(
            Guest::new(bare | feature).command(class, command, &data),
            OK
        );
    }
    let mut guest = Guest::new(EVERYTHING);
    for class in 0..=255 {
        for command in [6, 7, 255] {
            assert_eq!(guest.command(class, command, &[0; 32]), ERR);
        }
    }
    assert_eq!(guest.command(0, 0, &[2]), ERR);
    assert_eq!(guest.command(0, 0, &[]), ERR);
    assert_eq!(guest.raw_command(&[]), ERR);
    assert_eq!(guest.raw_command(&[0]), ERR);
}

#[test]
fn a_command_that_cannot_be_answered_is_not_done() {
    let mut guest = Guest::new(EVERYTHING);
    guest.ram.put(SPARE, &[0, 0, 1]);
    assert_eq!(guest.control(&[(SPARE, 3, false)]), Some(0));
    assert_eq!(heard(&mut guest), [true, false, false, true]);
    // A command in single bytes, an answer with room to spare.
    let parts = [
        (SPARE, 1, false),
        (SPARE + 1, 1, false),
        (SPARE + 2, 1, false),
        (SPARE + 9, 5, true),
    ];
    assert_eq!(guest.control(&parts), Some(1));
    assert_eq!(guest.net.take_signals().queues, bit(2));
    assert_eq!(heard(&mut guest), [true; 4]);
    // A command outside of memory: the driver broke the rules.
    assert_eq!(guest.control(&[(MEMORY, 3, false), (SPARE, 1, true)]), None);
    assert!(guest.net.take_signals().broken && !guest.device().ready());
    assert!(matches!(
        guest.device().fault(),
        Some(QueueError::Buffer(_))
    ));
}

#[test]
fn many_commands_are_done_some_at_a_time() {
    let mut guest = Guest::new(EVERYTHING);
    guest.ram.put(SPARE, &[0, 0, 1]);
    for _ in 0..40 {
        guest.offer(2, &[(SPARE, 3, false), (SPARE + 8, 1, true)]);
    }
    guest.net.notify(2);
    let mut rounds = 0;
    while guest.net.wants_service() {
        guest.net.serve(&mut guest.ram, Nanos::ZERO);
        assert_eq!(guest.net.take_signals().queues, bit(2));
        rounds += 1;
    }
    assert_eq!(rounds, 3);
    let ring = &mut guest.rings[2];
    assert_eq!(std::iter::from_fn(|| ring.take(&mut guest.ram)).count(), 40);
}

#[test]
fn random_commands_never_panic() {
    let mut random = Random(7);
    let mut guest = Guest::new(EVERYTHING);
    for _ in 0..20_000 {
        let mut bytes: Vec<u8> = (0..random.below(40)).map(|_| random.next() as u8).collect();
        if let [class, command, data @ ..] = &mut bytes[..] {
            *class %= 7;
            *command %= 8;
            // Small counts now and then.
            if random.below(2) == 0 && data.len() > 3 {
                data[..4].copy_from_slice(&(random.below(5) as u32).to_le_bytes());
            }
        }
        assert!(guest.raw_command(&bytes) <= 1);
    }
}
