//! Against a model that keeps one entry for every page.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const PAGES: u32 = 40;

/// Where a page is: the generation and the page in its data, or zeros.
type Model = Vec<Option<(Id, u32)>>;

/// One step of a guest's life.
#[derive(Debug, Clone)]
enum Step {
    /// A pause: what each page came to. Not written, written zeros, written.
    Pause(Vec<Option<bool>>),
    Merge,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let page = prop_oneof![4 => Just(None), 1 => Just(Some(false)), 3 => Just(Some(true))];
    // Runs of one kind, so that extents of several pages come about and are cut.
    let runs = vec((page, 1..6_usize), 40).prop_map(|runs| {
        let pages = runs.into_iter().flat_map(|(page, count)| std::iter::repeat_n(page, count));
        pages.take(PAGES as usize).collect()
    });
    vec(prop_oneof![3 => runs.prop_map(Step::Pause), 1 => Just(Step::Merge)], 1..20)
}

fn id(number: usize) -> Id {
    Id((number as u128).to_be_bytes())
}

/// The runs that a packer would find.
fn written(pages: &[Option<bool>]) -> (Vec<Written>, u32) {
    let (mut runs, mut stored) = (Vec::<Written>::new(), 0);
    for (page, wrote) in (0..).zip(pages) {
        let Some(is_stored) = *wrote else { continue };
        runs.push(Written { page, pages: 1, stored: is_stored.then_some(stored) });
        stored += u32::from(is_stored);
    }
    (runs, stored)
}

fn read(header: &Header) -> Model {
    let one = |page| match header.mapping().lookup(page).unwrap().source {
        Source::Zero => None,
        Source::Stored { generation, page } => Some((header.generations()[usize::from(generation)].id, page)),
    };
    (0..header.mapping().pages()).map(one).collect()
}

/// What every header must be, whatever made it.
fn check(header: &Header) {
    assert_eq!(Header::decode(&header.encode()).as_ref(), Ok(header));
    let mut at = 0;
    let extents: Vec<_> = header.mapping().extents().collect();
    for (index, extent) in extents.iter().enumerate() {
        assert_eq!(header.mapping().lookup(at), Some(*extent));
        at += extent.pages;
        if let Some(next) = extents.get(index + 1) {
            let goes_on = match extent.source {
                Source::Zero => Source::Zero,
                Source::Stored { generation, page } => Source::Stored { generation, page: page + extent.pages },
            };
            assert_ne!(next.source, goes_on, "extents {index} and the next are one");
        }
    }
    assert_eq!(at, header.mapping().pages());
    assert_eq!(header.mapping().lookup(at), None);
    for index in 0..header.generations().len() {
        let is_used = |extent: &Extent| matches!(extent.source, Source::Stored { generation, .. } if usize::from(generation) == index);
        assert!(extents.iter().any(is_used), "generation {index} is listed and not used");
    }
}

proptest! {
    #[test]
    fn every_page_is_where_a_page_by_page_model_says(steps in steps()) {
        let mut model: Model = vec![None; PAGES as usize];
        let mut header: Option<Header> = None;
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Pause(pages) => {
                    let (runs, stored) = written(&pages);
                    let generation = Generation { id: id(number), pages: stored };
                    let next = overlay(id(1000 + number), PAGES, header.as_ref(), &runs, generation).unwrap();
                    for run in &runs {
                        model[run.page as usize] = run.stored.map(|page| (generation.id, page));
                    }
                    header = Some(next);
                }
                Step::Merge => {
                    let Some(old) = &header else { continue };
                    let fold = fold(old).unwrap();
                    // What a merge copies, in order.
                    let copied: Vec<(Id, u32)> = fold.copied.iter().flat_map(|run| {
                        let from = old.generations()[usize::from(run.generation)].id;
                        (run.page..run.page + run.pages).map(move |page| (from, page))
                    }).collect();
                    prop_assert_eq!(copied.len(), fold.pages as usize);
                    let next = fold.apply(old, id(number)).unwrap();
                    prop_assert!(next.generations().len() <= 2, "{:?}", next.generations());
                    prop_assert_eq!(next.id(), old.id());
                    // Read through what was copied, the memory is the same.
                    let through: Model = read(&next).into_iter().map(|place| match place {
                        Some((from, page)) if from == id(number) => Some(copied[page as usize]),
                        place => place,
                    }).collect();
                    prop_assert_eq!(through, model);
                    model = read(&next);
                    header = Some(next);
                }
            }
            if let Some(header) = &header {
                check(header);
                prop_assert_eq!(&read(header), &model);
            }
        }
    }

    #[test]
    fn a_part_of_a_mapping_is_what_its_pages_are(pages in vec(any::<Option<bool>>(), 1..60), part in (0..70_u32, 0..70_u32)) {
        let (runs, stored) = written(&pages);
        let generation = Generation { id: id(1), pages: stored };
        let header = overlay(id(0), pages.len() as u32, None, &runs, generation).unwrap();
        let all = read(&header);
        let mut at = part.0 as usize;
        for extent in header.mapping().extents_in(part.0..part.1) {
            for offset in 0..extent.pages {
                let place = match extent.source {
                    Source::Zero => None,
                    Source::Stored { page, .. } => Some((id(1), page + offset)),
                };
                prop_assert_eq!(all[at], place);
                at += 1;
            }
        }
        let end = (part.1 as usize).min(all.len()).max(part.0 as usize);
        prop_assert_eq!(at, end);
    }
}

fn stored(page: u32, pages: u32, stored: u32) -> Written {
    Written { page, pages, stored: Some(stored) }
}

#[test]
fn written_zeros_hide_what_the_parent_has() {
    let parent = overlay(id(0), 4, None, &[stored(0, 4, 0)], Generation { id: id(1), pages: 4 }).unwrap();
    let zeros = [Written { page: 1, pages: 2, stored: None }];
    let header = overlay(id(2), 4, Some(&parent), &zeros, Generation { id: id(3), pages: 0 }).unwrap();
    assert_eq!(read(&header), [Some((id(1), 0)), None, None, Some((id(1), 3))]);
    assert_eq!(header.generations(), parent.generations(), "nothing was stored, so there is no generation");
}

#[test]
fn neighbours_are_one_extent_only_when_their_storage_is() {
    let runs = [stored(0, 2, 0), stored(2, 2, 2), stored(4, 2, 8)];
    let header = overlay(id(0), 6, None, &runs, Generation { id: id(1), pages: 10 }).unwrap();
    assert_eq!(header.mapping().extents().map(|extent| extent.pages).collect::<Vec<_>>(), [4, 2]);
}

#[test]
fn what_cannot_follow_a_parent_is_refused() {
    let generation = Generation { id: id(1), pages: 4 };
    let parent = overlay(id(0), 4, None, &[stored(0, 4, 0)], generation).unwrap();
    let again = Generation { id: id(2), pages: 4 };
    assert_eq!(overlay(id(3), 5, Some(&parent), &[], again), Err(Error::MemorySize { memory: 20480, parent: 16384 }));
    let over = |runs: &[Written]| overlay(id(3), 4, Some(&parent), runs, again).unwrap_err();
    assert_eq!(over(&[stored(2, 1, 0), stored(1, 1, 1)]), Error::Order(1));
    assert_eq!(over(&[stored(1, 2, 0), stored(2, 1, 2)]), Error::Order(1));
    assert_eq!(over(&[stored(3, 2, 0)]), Error::Order(0));
    assert_eq!(over(&[stored(1, u32::MAX, 0)]), Error::Order(0));
    assert_eq!(over(&[stored(0, 0, 0)]), Error::Mapping(mapping::Error::EmptyExtent(0)));
    let beyond = header::Error::BeyondGeneration { generation: 1, end: 5, pages: 4 };
    assert_eq!(over(&[stored(0, 1, 4)]), Error::Header(beyond));
    let itself = overlay(id(3), 4, Some(&parent), &[stored(0, 1, 0)], generation);
    assert_eq!(itself, Err(Error::Header(header::Error::RepeatedGeneration(1))));
}

/// A header over a base of `base` pages of which each of `pauses` later generations overwrote one.
fn with_base(base: u32, pauses: u32) -> Header {
    let mut header = overlay(id(0), base, None, &[stored(0, base, 0)], Generation { id: id(1), pages: base }).unwrap();
    for pause in 0..pauses {
        let generation = Generation { id: id(2 + pause as usize), pages: 1 };
        header = overlay(id(0), base, Some(&header), &[stored(pause, 1, 0)], generation).unwrap();
    }
    header
}

#[test]
fn a_merge_leaves_a_large_base_where_it_is() {
    let header = with_base(100, MERGE_AT as u32 - 1);
    assert!(is_due(&header));
    let fold = fold(&header).unwrap();
    assert_eq!(fold.pages, MERGE_AT as u32 - 1);
    let merged = fold.apply(&header, id(99)).unwrap();
    assert_eq!(merged.generations().iter().map(|of| of.id).collect::<Vec<_>>(), [id(1), id(99)]);
    assert!(!is_due(&merged));
}

#[test]
fn a_merge_takes_a_base_that_is_mostly_overwritten() {
    // 8 of 20 pages are still in use: more than all others together, and less than half.
    let mut header = with_base(20, MERGE_AT as u32 - 1);
    let zeros = [Written { page: 7, pages: 5, stored: None }];
    header = overlay(id(0), 20, Some(&header), &zeros, Generation { id: id(50), pages: 0 }).unwrap();
    let fold = fold(&header).unwrap();
    assert_eq!(fold.pages, 15);
    let merged = fold.apply(&header, id(99)).unwrap();
    assert_eq!(merged.generations(), [Generation { id: id(99), pages: 15 }]);
}
