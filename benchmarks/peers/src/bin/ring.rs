//! Take and complete block chains on the published `virtio-queue` and `vm-memory` crates.
//!
//! `ring [--seconds=S] [--regions=R] [--batch=B] [--loop=pop|collect]` prints nanoseconds per
//! chain, of the best sample of 2048 chains.
//!
//! The layout is that of `benchmarks/rings/ring.py`: a split ring of 512 entries in region 0, and
//! 128 chains of three direct descriptors (16 bytes header, 4096 bytes data, 1 byte status). Header
//! and status of chain `i` lie in region `1 + 2i mod (R-1)`, its data in region
//! `1 + (2i+1) mod (R-1)`, each in page `i` of its part of the region.
//!
//! For each chain the device reads the header, checks that the data buffer is inside a region,
//! writes the status and adds a used element. For each batch it decides about the notification: the
//! event index is on, and the driver never wants one.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const QUEUE: u16 = 512;
const CHAINS: u16 = 128;
const REGION: usize = 2 << 20;
/// A hole after each region, so that no two are neighbours.
const STRIDE: u64 = 4 << 20;
const DESCRIPTORS: u64 = 0;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Chains between two looks at the clock.
const SAMPLE: u64 = 2048;

type Memory = GuestMemoryMmap<()>;

fn memory(regions: u64) -> Memory {
    let ranges: Vec<_> = (0..regions)
        .map(|region| (GuestAddress(region * STRIDE), REGION))
        .collect();
    Memory::from_ranges(&ranges).unwrap()
}

fn fill(memory: &Memory, regions: u64) {
    let others = regions - 1;
    for chain in 0..u64::from(CHAINS) {
        let control = (1 + 2 * chain % others) * STRIDE + 0xc0000 + chain * 4096;
        let data = (1 + (2 * chain + 1) % others) * STRIDE + 0x10000 + chain * 4096;
        let head = (chain * 3) as u16;
        let (next, write) = (VRING_DESC_F_NEXT as u16, VRING_DESC_F_WRITE as u16);
        for (index, descriptor) in [
            Descriptor::new(control, 16, next, head + 1),
            Descriptor::new(data, 4096, next | write, head + 2),
            Descriptor::new(control + 32, 1, write, 0),
        ]
        .into_iter()
        .enumerate()
        {
            let place = DESCRIPTORS + (u64::from(head) + index as u64) * 16;
            memory.write_obj(descriptor, GuestAddress(place)).unwrap();
        }
    }
    for slot in 0..QUEUE {
        let place = AVAIL + 4 + 2 * u64::from(slot);
        memory.write_obj((slot % CHAINS) * 3, GuestAddress(place)).unwrap();
    }
    // used_event is far off: the driver polls and wants no notification.
    let used_event = AVAIL + 4 + 2 * u64::from(QUEUE);
    memory.write_obj(0x8000u16, GuestAddress(used_event)).unwrap();
}

fn queue() -> Queue {
    let mut queue = Queue::new(QUEUE).unwrap();
    queue.set_size(QUEUE);
    queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_event_idx(true);
    queue.set_ready(true);
    queue
}

/// Read the header and write the status of one chain; return its head and the bytes written.
fn serve(memory: &Memory, mut chain: DescriptorChain<&Memory>) -> (u16, u32) {
    let head = chain.head_index();
    let header = chain.next().unwrap();
    let data = chain.next().unwrap();
    let status = chain.next().unwrap();
    let request: [u8; 16] = memory.read_obj(header.addr()).unwrap();
    std::hint::black_box(request);
    let slice = GuestMemoryBackend::get_slice(memory, data.addr(), data.len() as usize).unwrap();
    std::hint::black_box(slice.ptr_guard_mut().as_ptr());
    memory.write_obj(0u8, status.addr()).unwrap();
    (head, data.len() + 1)
}

fn popped(memory: &Memory, queue: &mut Queue) -> u32 {
    let mut count = 0;
    while let Some(chain) = queue.pop_descriptor_chain(memory) {
        let (head, written) = serve(memory, chain);
        queue.add_used(memory, head, written).unwrap();
        count += 1;
    }
    count
}

fn collected(memory: &Memory, queue: &mut Queue) -> u32 {
    let chains: Vec<_> = queue.iter(memory).unwrap().collect();
    let count = chains.len() as u32;
    for chain in chains {
        let (head, written) = serve(memory, chain);
        queue.add_used(memory, head, written).unwrap();
    }
    count
}

type Take = fn(&Memory, &mut Queue) -> u32;

/// Take and complete `turns` batches.
fn run(memory: &Memory, queue: &mut Queue, avail: &mut u16, batch: u16, turns: u64, take: Take) {
    let index = GuestAddress(AVAIL + 2);
    for _ in 0..turns {
        *avail = avail.wrapping_add(batch);
        memory.store(avail.to_le(), index, Ordering::Release).unwrap();
        assert_eq!(take(memory, queue), u32::from(batch));
        std::hint::black_box(queue.needs_notification(memory).unwrap());
    }
}

fn main() {
    let (mut seconds, mut regions, mut batch) = (0.5, 2, 32);
    let mut take: Take = popped;
    for argument in std::env::args().skip(1) {
        match argument.split_once('=') {
            Some(("--seconds", value)) => seconds = value.parse().expect("seconds"),
            Some(("--regions", value)) => regions = value.parse().expect("a number of regions"),
            Some(("--batch", value)) => batch = value.parse().expect("a batch size"),
            Some(("--loop", "pop")) => take = popped,
            Some(("--loop", "collect")) => take = collected,
            _ => panic!("unknown argument {argument}"),
        }
    }
    let memory = memory(regions);
    fill(&memory, regions);
    let (mut queue, mut avail) = (queue(), 0u16);
    let index = GuestAddress(AVAIL + 2);
    memory.store(avail.to_le(), index, Ordering::Release).unwrap();
    let turns = (SAMPLE / u64::from(batch)).max(1);
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while begin.elapsed() < Duration::from_secs_f64(seconds) {
        let start = Instant::now();
        run(&memory, &mut queue, &mut avail, batch, turns, take);
        let spent = start.elapsed().as_nanos() as f64;
        best = best.min(spent / (turns * u64::from(batch)) as f64);
    }
    println!("{best:.2}");
}
