//! What every disk does, however it is made.
#![expect(clippy::print_stderr, reason = "a failed run is understood by its seed")]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::mpsc;
use std::thread;

use disk::{Backend, Disks, Error};

use crate::world::{IMAGE, MIB, Random, World, fresh, read_all};

pub fn a_disk_begins_as_its_image_and_is_nobody_else_s(backend: Backend) {
    let world = World::new(backend);
    let image = fs::read(&world.image).unwrap();
    let (one, one_s) = world.made("one", IMAGE);
    let (other, other_s) = world.made("other", IMAGE);
    assert!(read_all(&one_s) == fresh(IMAGE) && image == fresh(IMAGE));
    one_s.write_all_at(b"mine!", 0).unwrap();
    one_s.write_all_at(&[1; 9000], 3 * MIB - 1).unwrap();
    world.disks.sync(&one).unwrap();
    assert!(read_all(&other_s) == fresh(IMAGE));
    let mut expected = fresh(IMAGE);
    expected[..5].copy_from_slice(b"mine!");
    expected[3 * MIB as usize - 1..][..9000].fill(1);
    assert!(read_all(&one_s) == expected);
    drop((one_s, other_s));
    for disk in [&one, &other] {
        world.disks.detach(disk).unwrap();
        world.disks.detach(disk).unwrap();
    }
    assert!(world.all_of(&one) == expected);
    assert!(fs::read(&world.image).unwrap() == image);
    fs::remove_file(&one).unwrap();
    world.disks.detach(&one).unwrap();
    assert!(world.all_of(&other) == fresh(IMAGE));
    world.end();
}

pub fn a_disk_may_be_larger_than_its_image(backend: Backend) {
    let world = World::new(backend);
    let size = 5 * IMAGE;
    let (disk, user) = world.made("large", size);
    assert!(read_all(&user) == fresh(size));
    user.write_all_at(b"over the edge", IMAGE - 4).unwrap();
    user.write_all_at(b"end", size - 3).unwrap();
    assert!(user.write_all_at(b"!", size).is_err() || backend != Backend::DeviceMapper);
    drop(user);
    world.disks.detach(&disk).unwrap();
    let mut expected = fresh(size);
    expected[IMAGE as usize - 4..][..13].copy_from_slice(b"over the edge");
    expected[size as usize - 3..].copy_from_slice(b"end");
    assert!(world.all_of(&disk)[..size as usize] == expected);
    assert!(fs::metadata(&disk).unwrap().blocks() * 512 < 2 * MIB, "what is at rest takes what it has");
    world.end();
}

pub fn a_copy_is_what_a_disk_was_then(backend: Backend) {
    let world = World::new(backend);
    let (disk, user) = world.made("parent", 2 * IMAGE);
    user.write_all_at(&[1; 100_000], MIB).unwrap();
    // Not synced, and in use: what was written counts, wherever it is.
    let copies: Vec<_> = (0..3).map(|index| world.place(&format!("child-{index}"))).collect();
    world.disks.copy(&disk, &copies[0]).unwrap();
    user.write_all_at(&[2; 100_000], MIB + 50_000).unwrap();
    world.disks.copy(&disk, &copies[1]).unwrap();
    drop(user);
    world.disks.detach(&disk).unwrap();
    fs::remove_file(&disk).unwrap();
    // A copy of a copy, and one that goes its own way.
    world.disks.copy(&copies[0], &copies[2]).unwrap();
    let child = world.attach(&copies[0]);
    child.write_all_at(&[3; 10], 0).unwrap();
    drop(child);
    world.disks.detach(&copies[0]).unwrap();

    let mut expected = fresh(2 * IMAGE);
    expected[MIB as usize..][..100_000].fill(1);
    assert!(world.all_of(&copies[2]) == expected);
    let mut first = expected.clone();
    first[..10].fill(3);
    assert!(world.all_of(&copies[0]) == first);
    expected[MIB as usize + 50_000..][..100_000].fill(2);
    assert!(world.all_of(&copies[1]) == expected);
    world.end();
}

pub fn a_disk_that_is_in_use_survives_who_made_it(backend: Backend) {
    let mut world = World::new(backend);
    let (kept, user) = world.made("kept", IMAGE);
    let (left, leaver) = world.made("left", IMAGE);
    user.write_all_at(b"before", 0).unwrap();
    leaver.write_all_at(b"before", 0).unwrap();
    // Of one the VMM goes while nobody looks.
    drop(leaver);
    world.open_again();
    world.disks.sweep(std::slice::from_ref(&kept)).unwrap();
    user.write_all_at(b"after", 10).unwrap();
    world.disks.sync(&kept).unwrap();
    let copy = world.place("copy");
    world.disks.copy(&kept, &copy).unwrap();
    drop(user);
    world.disks.detach(&kept).unwrap();
    world.disks.detach(&left).unwrap();
    let mut expected = fresh(IMAGE);
    expected[..6].copy_from_slice(b"before");
    assert!(world.all_of(&left) == expected);
    expected[10..15].copy_from_slice(b"after");
    assert!(world.all_of(&kept) == expected && world.all_of(&copy) == expected);
    world.end();
}

pub fn a_disk_is_let_go_when_its_last_user_has(backend: Backend) {
    let world = World::new(backend);
    let (disk, user) = world.made("busy", IMAGE);
    let (say, hear) = mpsc::channel::<()>();
    let waiting = thread::spawn(move || {
        // Let go only when somebody is waiting, or about to.
        hear.recv().unwrap();
        let _ = rustix::thread::nanosleep(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 200_000_000 });
        user.write_all_at(b"at the last moment", 0).unwrap();
        drop(user);
    });
    say.send(()).unwrap();
    world.disks.detach(&disk).unwrap();
    waiting.join().unwrap();
    assert_eq!(&world.all_of(&disk)[..18], b"at the last moment");

    // And one that is never let go stays as it is.
    let user = world.attach(&disk);
    match world.disks.detach(&disk) {
        Err(Error::Busy(path)) => assert_eq!((path, backend), (disk.clone(), Backend::DeviceMapper)),
        detached => {
            detached.unwrap();
            assert_ne!(backend, Backend::DeviceMapper);
        }
    }
    user.write_all_at(b"as", 0).unwrap();
    drop(user);
    world.disks.detach(&disk).unwrap();
    assert_eq!(&world.all_of(&disk)[..18], b"as the last moment");
    world.end();
}

pub fn what_is_written_is_there_however_often_it_is_copied_and_attached(backend: Backend) {
    let seed = std::env::var("WRENN_SEED").map_or(u64::from(std::process::id()), |seed| seed.parse().unwrap());
    eprintln!("WRENN_SEED={seed}");
    let (mut random, mut world) = (Random(seed), World::new(backend));
    let size = IMAGE + 3 * MIB;
    // A few disks, and what each must be.
    let first = world.place("disk-0");
    world.disks.create(&world.image, &first, Some(size)).unwrap();
    let mut disks = vec![(first, fresh(size))];
    for round in 1..40 {
        let chosen = random.below(disks.len() as u64) as usize;
        let (disk, expected) = &mut disks[chosen];
        let user = world.attach(disk);
        for _ in 0..random.below(20) {
            // Also parts of sectors and pages, and zeros.
            let (at, byte) = (random.below(size - 1), random.below(4) as u8);
            let len = (random.below(60_000) + 1).min(size - at);
            user.write_all_at(&vec![byte; len as usize], at).unwrap();
            expected[at as usize..(at + len) as usize].fill(byte);
        }
        if random.below(2) == 0 {
            world.disks.sync(disk).unwrap();
        }
        let copied = (random.below(3) == 0).then(|| {
            let copy = world.place(&format!("disk-{round}"));
            world.disks.copy(disk, &copy).unwrap();
            (copy, expected.clone())
        });
        drop(user);
        world.disks.detach(disk).unwrap();
        disks.extend(copied);
        if random.below(5) == 0 {
            world.open_again();
        }
        if disks.len() > 4 {
            let (gone, _) = disks.swap_remove(random.below(4) as usize);
            fs::remove_file(gone).unwrap();
        }
    }
    for (disk, expected) in disks {
        assert!(read_all(&world.disks.flat(&disk).unwrap()) == expected);
        assert!(world.all_of(&disk) == expected, "{} differs", disk.display());
    }
    world.end();
}

pub fn a_flat_disk_has_all_of_it_and_no_zeros(backend: Backend) {
    let world = World::new(backend);
    let size = 8 * IMAGE;
    let (disk, user) = world.made("flat", size);
    user.write_all_at(&[5; MIB as usize], 20 * MIB).unwrap();
    // Zeros where the image has none.
    user.write_all_at(&[0; 200_000], 3 * MIB + 17).unwrap();
    drop(user);
    world.disks.detach(&disk).unwrap();
    let mut expected = fresh(size);
    expected[20 * MIB as usize..][..MIB as usize].fill(5);
    expected[3 * MIB as usize + 17..][..200_000].fill(0);
    let flat = world.disks.flat(&disk).unwrap();
    assert!(read_all(&flat) == expected);
    assert!(flat.metadata().unwrap().blocks() * 512 < 3 * MIB, "holes stay holes");
    // And it can be an image, of which others are made.
    let file = world.disks.root().join("flat.ext4");
    io::copy(&mut &flat, &mut File::create(&file).unwrap()).unwrap();
    drop(flat);
    let image = world.disks.import_image(&file, &"flat".parse().unwrap()).unwrap();
    let next = world.place("next");
    world.disks.create(&image, &next, Some(size)).unwrap();
    assert!(world.all_of(&next) == expected);
    world.end();
}

pub fn what_cannot_be_made_says_why_and_leaves_nothing(backend: Backend) {
    let world = World::new(backend);
    let disk = world.place("disk");
    let missing = world.disks.images().join("no-such-image");
    let refused = world.disks.create(&missing, &disk, None).unwrap_err();
    assert!(matches!(&refused, Error::ImageMissing(path) if *path == missing), "{refused:?}");
    let refused = world.disks.create(&world.image, &disk, Some(IMAGE - 1)).unwrap_err();
    assert!(matches!(refused, Error::TooSmall { asked, image_size, .. } if (asked, image_size) == (IMAGE - 1, IMAGE)));
    if backend == Backend::DeviceMapper {
        let refused = world.disks.create(&world.image, &disk, Some(IMAGE + 1)).unwrap_err();
        assert!(matches!(refused, Error::Uneven { size, .. } if size == IMAGE + 1), "{refused:?}");
        let elsewhere = world.disks.root().join("elsewhere.img");
        fs::copy(&world.image, &elsewhere).unwrap();
        let refused = world.disks.create(&elsewhere, &disk, None).unwrap_err();
        assert!(matches!(&refused, Error::NotImported(path) if *path == elsewhere), "{refused:?}");
    }
    assert!(!disk.exists());
    assert!(matches!(world.disks.attach(&disk), Err(Error::Disk { .. })));
    world.disks.create(&world.image, &disk, None).unwrap();
    for made in [world.disks.create(&world.image, &disk, None), world.disks.copy(&disk, &disk)] {
        assert!(matches!(made, Err(Error::Write { .. })), "a disk is never replaced");
    }
    // What it is over is told, and missed when it is gone.
    let under = disk::image_under(&disk).unwrap();
    assert_eq!(under.is_some(), backend == Backend::DeviceMapper);
    fs::remove_file(&world.image).unwrap();
    if let Some(image) = under {
        assert!(world.image.ends_with(image));
        assert!(matches!(world.disks.attach(&disk), Err(Error::ImageMissing(path)) if path == world.image));
        assert!(matches!(world.disks.flat(&disk), Err(Error::ImageMissing(path)) if path == world.image));
        assert_eq!(fs::metadata(&disk).unwrap().len(), 0, "nothing stays reserved");
    } else {
        assert!(world.all_of(&disk) == fresh(IMAGE));
    }
    world.end();
}

pub fn disks_of_different_kinds_live_in_one_directory(backend: Backend) {
    let world = World::new(backend);
    let (disk, user) = world.made("disk", IMAGE);
    user.write_all_at(b"mine!", 0).unwrap();
    drop(user);
    world.disks.detach(&disk).unwrap();
    // A guest that writes what such a file begins with has written that, and nothing else.
    let plain = world.place("plain");
    world.disks.copy(&world.image, &plain).unwrap();
    let user = world.attach(&plain);
    user.write_all_at(&fs::read(&disk).unwrap(), 0).unwrap();
    drop(user);
    world.disks.detach(&plain).unwrap();
    assert!(world.all_of(&plain)[..4096] == fs::read(&disk).unwrap()[..4096]);
    assert_eq!(disk::image_under(&plain).unwrap(), None);

    // The next to open the directory makes them otherwise, and has these all the same.
    let data = world.disks.root().to_owned();
    let others = Disks::open(&data, "others", Some(Backend::Copy)).unwrap();
    let copy = world.place("copy");
    others.copy(&disk, &copy).unwrap();
    let found = read_all(&others.flat(&copy).unwrap());
    let mut expected = fresh(IMAGE);
    expected[..5].copy_from_slice(b"mine!");
    assert!(found == expected);
    assert!(world.all_of(&copy) == expected);
    world.end();
}
