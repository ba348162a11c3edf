//! The same by the overlay back end.

use crate::ground::{Ground, same, with_unlinked_ground};
use crate::operations::{Op, Place, snapshot};
use crate::random::Random;
use crate::table::table;
use crate::{seeds, steps};

/// The operations that the kernel's overlay does as a plain directory does them. A file that is open to be read, and is
/// copied up after that, goes on to show what it was (`overlayfs.rst`, «Non-standard behavior»): each is open to be
/// written too.
fn standard(op: Op) -> Op {
    match op {
        Op::Open(slot, path, _) => Op::Open(slot, path, true),
        op => op,
    }
}

/// Does the same in the view and in the plain directory. What is no move but a copy, the overlay says of directories that
/// the tree has (`EXDEV`), as between two disks; then nothing may have happened, and nothing does in the plain directory.
fn same_or_copy(view: &mut Place, plain: &mut Place, op: &Op, context: &str) {
    if let Op::Rename(from, to) | Op::RenameNew(from, to) | Op::Exchange(from, to) = op
        && [from, to].iter().any(|path| plain.top.join(path).is_dir())
    {
        let told = view.apply(op);
        if told == Err(libc::EXDEV) {
            return;
        }
        assert_eq!(told, plain.apply(op), "{context}: {op:?}");
        return;
    }
    same(view, plain, op, context);
}

/// Compares all but which names are one file: of what it has copied up, the overlay says that only as long as it has it in
/// memory.
fn assert_same(ground: &Ground, context: &str) {
    let shown = |name: &str| {
        let all = snapshot(&ground.at(name)).into_iter();
        all.filter(|line| !line.starts_with("one file: ")).collect::<Vec<_>>()
    };
    assert_eq!(shown("view"), shown("plain"), "{context}");
}

fn both(ground: &Ground) -> (Place, Place) {
    (Place::new(&ground.at("view")), Place::new(&ground.at("plain")))
}

#[test]
fn the_overlay_back_end_does_every_operation_of_the_table() {
    for (name, operations) in table() {
        with_unlinked_ground(move |ground| {
            let mounted = ground.overlay();
            let (mut view, mut plain) = both(ground);
            for op in operations {
                same_or_copy(&mut view, &mut plain, &standard(op), name);
            }
            view.close_all();
            plain.close_all();
            assert_same(ground, name);
            mounted.unmount();
            let mounted = ground.overlay();
            assert_same(ground, &format!("{name}, mounted again"));
            mounted.unmount();
            // One form of scratch for both back ends.
            let mounted = ground.edit();
            assert_same(ground, &format!("{name}, served"));
            mounted.unmount().unwrap();
        });
    }
}

/// Operations by chance, now by one back end and now by the other.
fn by_chance(seed: u64, next: fn(&mut Random) -> Op) {
    with_unlinked_ground(move |ground| {
        let mut random = Random(seed);
        let mut mounted = ground.overlay();
        let (mut view, mut plain) = both(ground);
        for step in 0..steps() {
            let context = format!("seed {seed}, step {step}");
            same_or_copy(&mut view, &mut plain, &standard(next(&mut random)), &context);
            if random.below(300) == 0 {
                view.close_all();
                plain.close_all();
                assert_same(ground, &context);
                mounted.unmount();
                let served = ground.edit();
                assert_same(ground, &format!("{context}, served"));
                for _ in 0..20 {
                    same(&mut view, &mut plain, &next(&mut random), &format!("{context}, served"));
                }
                view.close_all();
                plain.close_all();
                served.unmount().unwrap();
                mounted = ground.overlay();
                assert_same(ground, &format!("{context}, mounted again"));
            }
        }
        view.close_all();
        plain.close_all();
        assert_same(ground, &format!("seed {seed}, at the end"));
        mounted.unmount();
    });
}

#[test]
fn data_changed_by_chance_by_both_back_ends_are_those_of_a_plain_directory() {
    seeds(2).into_iter().for_each(|seed| by_chance(seed, Random::on_data));
}

#[test]
fn names_changed_by_chance_by_both_back_ends_are_those_of_a_plain_directory() {
    seeds(3).into_iter().for_each(|seed| by_chance(seed, Random::on_names));
}
