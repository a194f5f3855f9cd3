//! A file system that is full. Whoever writes is told so, and nothing that was written is lost.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use disk::{Backend, Error};
use rustix::fs::FallocateFlags;

use crate::world::{IMAGE, MIB, Small, World, fresh, read_all};

const PART: u64 = MIB;

/// XFS makes none that is smaller.
const SMALL: u64 = 320 * MIB;

pub fn a_disk_that_does_not_fit_fails_in_its_own_writes_or_before(backend: Backend) {
    let small = Small::new(SMALL);
    let world = World::on(backend, &small.path());
    let (size, disk) = (64 * MIB, world.place("large"));
    world.disks.create(&world.image, &disk, Some(size)).unwrap();
    let filler = fill(&small, size / 2);
    let free = small.free();
    match world.disks.attach(&disk) {
        Err(Error::NoSpace { path, .. }) => {
            assert_eq!((path, backend), (disk.clone(), Backend::DeviceMapper));
            assert!(small.free() + MIB > free, "nothing stays reserved");
        }
        attached => {
            assert_ne!(backend, Backend::DeviceMapper, "{attached:?}");
            let user = world.attach(&disk);
            // From the end of the image on, until the guest is told.
            let parts = IMAGE / PART..size / PART;
            let write = |part: u64| {
                user.write_all_at(&[part as u8 | 1; PART as usize], part * PART).and_then(|()| user.sync_all())
            };
            let refused = parts.clone().find_map(|part| write(part).err().map(|error| (part, error)));
            let (last, error) = refused.expect("it cannot hold all of it");
            assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
            // What was written is there, now and when it is attached again; and where there is space again it goes on.
            let check = |user: &File| {
                let all = read_all(user);
                assert!(all[..IMAGE as usize] == fresh(IMAGE));
                for part in parts.start..last {
                    assert!(all[(part * PART) as usize..][..PART as usize].iter().all(|&byte| byte == part as u8 | 1));
                }
            };
            check(&user);
            drop(user);
            world.disks.detach(&disk).unwrap();
            check(&world.attach(&disk));
        }
    }
    // Another one that fits is not in its way.
    drop(filler);
    fs::remove_file(&disk).unwrap();
    let (fits, user) = world.made("fits", IMAGE);
    assert!(read_all(&user) == fresh(IMAGE));
    drop(user);
    world.disks.detach(&fits).unwrap();
    world.end();
}

/// Fills what is free of the file system, but for `rest`.
fn fill(small: &Small, rest: u64) -> File {
    let file = File::create(small.path().join("filler")).unwrap();
    let mut at = small.free().saturating_sub(rest + 4 * MIB) / 4096 * 4096;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, at).unwrap();
    // What is told to be free may be less than there is.
    for step in [64 * MIB, MIB, 4096] {
        while rest == 0 && rustix::fs::fallocate(&file, FallocateFlags::empty(), at, step).is_ok() {
            at += step;
        }
    }
    file.sync_all().unwrap();
    file
}

/// What was reserved is there. Disks that reserve nothing are told by their writes, and go on once there is space.
pub fn a_disk_that_was_attached_can_be_filled_though_nothing_else_fits(backend: Backend) {
    let small = Small::new(SMALL);
    let world = World::on(backend, &small.path());
    let size = 96 * MIB;
    let (disk, user) = world.made("filled", size);
    user.write_all_at(b"mine!", 0).unwrap();
    user.sync_all().unwrap();
    let filler = fill(&small, 0);
    let mut expected = fresh(size);
    expected[..5].copy_from_slice(b"mine!");
    let mut refused = false;
    let order = (0..size / PART).map(|index| index * 37 % (size / PART));
    for part in order.clone() {
        let bytes = vec![part as u8 | 1; PART as usize];
        match user.write_all_at(&bytes, part * PART).and_then(|()| user.sync_all()) {
            Ok(()) => expected[(part * PART) as usize..][..PART as usize].copy_from_slice(&bytes),
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
                refused = true;
                break;
            }
        }
    }
    assert_eq!(refused, backend != Backend::DeviceMapper, "what was reserved is there, and nothing else");
    drop(filler);
    fs::remove_file(small.path().join("filler")).unwrap();
    rustix::fs::syncfs(File::open(small.path()).unwrap()).unwrap();
    for part in order {
        let bytes = vec![part as u8 | 1; PART as usize];
        user.write_all_at(&bytes, part * PART).unwrap();
        expected[(part * PART) as usize..][..PART as usize].copy_from_slice(&bytes);
    }
    user.sync_all().unwrap();
    assert!(read_all(&user) == expected);
    drop(user);
    world.disks.detach(&disk).unwrap();
    assert!(world.all_of(&disk) == expected);
    assert!(read_all(&world.disks.flat(&disk).unwrap()) == expected);
    world.end();
}
