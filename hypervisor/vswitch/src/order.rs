//! Sorting, small: the sorts of the standard library are made anew for every type, at some eight
//! kilobytes each, and nothing here is sorted while frames wait.

/// Things in an order.
trait Items {
    /// Whether that at `a` comes before that at `b`.
    fn before(&self, a: usize, b: usize) -> bool;
    fn swap(&mut self, a: usize, b: usize);
}

struct Slice<'a, T, F>(&'a mut [T], F);

impl<T, F: Fn(&T, &T) -> bool> Items for Slice<'_, T, F> {
    fn before(&self, a: usize, b: usize) -> bool {
        match (self.0.get(a), self.0.get(b)) {
            (Some(a), Some(b)) => (self.1)(a, b),
            _ => false,
        }
    }

    fn swap(&mut self, a: usize, b: usize) {
        if a.max(b) < self.0.len() {
            self.0.swap(a, b);
        }
    }
}

/// Sorts by `before`, which says whether one comes before another; equals in no certain order.
pub(crate) fn sort_by<T>(items: &mut [T], before: impl Fn(&T, &T) -> bool) {
    let length = items.len();
    heap_sort(&mut Slice(items, before), length);
}

/// Sorts; equals in no certain order.
pub(crate) fn sort<T: Ord>(items: &mut [T]) {
    sort_by(items, T::lt);
}

/// Heap sort: in place, and never slower than the logarithm wants, whatever the order before.
fn heap_sort(items: &mut dyn Items, length: usize) {
    for top in (0..length / 2).rev() {
        sink(items, top, length);
    }
    for end in (1..length).rev() {
        items.swap(0, end);
        sink(items, 0, end);
    }
}

/// Brings what is at `at` below all that comes after it.
fn sink(items: &mut dyn Items, mut at: usize, end: usize) {
    loop {
        let mut last = at;
        for child in [2 * at + 1, 2 * at + 2] {
            if child < end && items.before(last, child) {
                last = child;
            }
        }
        if last == at {
            return;
        }
        items.swap(at, last);
        at = last;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_sorts(mut items in prop::collection::vec(0..50u8, 0..200)) {
            let mut want = items.clone();
            want.sort_unstable();
            sort(&mut items);
            prop_assert_eq!(&items, &want);
            want.reverse();
            sort_by(&mut items, |a, b| a > b);
            prop_assert_eq!(&items, &want);
        }
    }
}
