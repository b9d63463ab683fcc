//! The machine's wall clock: the MC146818's time registers.

use crate::power::Port;

/// Seconds since 1970-01-01 00:00 UTC as the RTC says, taking it to run in UTC; `None` where its
/// registers make no sense.
///
/// # Safety
/// Nothing else drives ports 0x70 and 0x71.
#[must_use]
pub unsafe fn wall_clock() -> Option<u64> {
    // SAFETY: promised by the caller.
    let read = |register: u8| unsafe {
        Port::<u8>::new(0x70).write(register);
        Port::<u8>::new(0x71).read()
    };
    // Two equal readings with no update in progress (MC146818A, "update cycle").
    let mut last = None;
    for _ in 0..10_000 {
        if read(0x0a) & 0x80 != 0 {
            continue;
        }
        let fields = [0x00, 0x02, 0x04, 0x07, 0x08, 0x09, 0x32].map(read);
        if last == Some(fields) {
            return decode(fields, read(0x0b));
        }
        last = Some(fields);
    }
    None
}

/// Registers second, minute, hour, day, month, year, century, and register B.
fn decode(fields: [u8; 7], format: u8) -> Option<u64> {
    let binary = format & 0x04 != 0;
    let plain = |value: u8| {
        if binary {
            value
        } else {
            (value >> 4) * 10 + (value & 15)
        }
    };
    let [second, minute, hour, day, month, year, century] = fields;
    let mut hours = plain(hour & 0x7f);
    if format & 0x02 == 0 {
        hours = hours % 12 + if hour & 0x80 != 0 { 12 } else { 0 };
    }
    let century = match plain(century) {
        century @ 19..=29 => u64::from(century),
        _ => 20,
    };
    let (second, minute) = (u64::from(plain(second)), u64::from(plain(minute)));
    let (day, month) = (u64::from(plain(day)), u64::from(plain(month)));
    let year = century * 100 + u64::from(plain(year));
    let sane = second < 60 && minute < 60 && hours < 24 && (1..=31).contains(&day);
    if !sane || !(1..=12).contains(&month) || year < 1970 {
        return None;
    }
    // Days by the civil calendar, with the year starting in March.
    let (y, m) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
    Some(((days * 24 + u64::from(hours)) * 60 + minute) * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::decode;

    #[test]
    fn all_formats_of_the_chip_give_the_same_second() {
        let want = Some(1_700_000_000); // 2023-11-14 22:13:20
        assert_eq!(
            decode([0x20, 0x13, 0x22, 0x14, 0x11, 0x23, 0x20], 0x02),
            want
        );
        assert_eq!(decode([20, 13, 22, 14, 11, 23, 20], 0x06), want);
        assert_eq!(
            decode([0x20, 0x13, 0x90, 0x14, 0x11, 0x23, 0x20], 0x00),
            want
        );
        assert_eq!(decode([0, 0, 0, 1, 1, 0, 20], 0x06), Some(946_684_800));
    }

    #[test]
    fn nonsense_is_not_a_time() {
        for fields in [
            [99, 0, 0, 1, 1, 0, 20],
            [0, 0, 0, 0, 1, 0, 20],
            [0, 0, 0, 1, 13, 0, 20],
        ] {
            assert_eq!(decode(fields, 0x06), None);
        }
    }
}
