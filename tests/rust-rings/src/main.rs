//! One end of a split ring on the published `virtio-queue` and `vm-memory` crates, over memory that another process shares.
//!
//! `rust-rings device|driver|mock --memory=FD --kick=FD --call=FD --chains=N ...` maps the memory (guest address 4 GiB),
//! works through N chains and prints how many; anything that is wrong ends it with a message and status 1.
//!
//! Chain `n` carries a request of `8 + n % 57` bytes: `n`, then `(n + k) % 256`. The answer is `n` again and every other
//! byte of the request xor 0x5A. The device here and the driver here check and make the same bytes as the tests beside.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::sync::atomic::{fence, Ordering};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

const GUEST: u64 = 1 << 32;
/// The longest request and the longest answer.
const ROOM: u64 = 64;
/// The driver has this many descriptors for each chain.
const SHARE: u16 = 4;
const MASK: u8 = 0x5A;

type Memory = GuestMemoryMmap<()>;

struct Options {
    memory: i32,
    size: usize,
    kick: i32,
    call: i32,
    queue: u16,
    descriptors: u64,
    avail: u64,
    used: u64,
    /// Where the driver may put tables and buffers.
    room: u64,
    chains: u64,
    event_idx: bool,
    indirect: bool,
}

fn options() -> (String, Options) {
    let mut o = Options {
        memory: -1, size: 0, kick: -1, call: -1, queue: 0, descriptors: 0, avail: 0, used: 0, room: 0, chains: 0,
        event_idx: false, indirect: false,
    };
    let mut arguments = std::env::args().skip(1);
    let role = arguments.next().expect("a role");
    for argument in arguments {
        let (name, value) = argument.split_once('=').expect("--name=value");
        let value: u64 = value.parse().expect("a number");
        match name {
            "--memory" => o.memory = value as i32,
            "--size" => o.size = value as usize,
            "--kick" => o.kick = value as i32,
            "--call" => o.call = value as i32,
            "--queue" => o.queue = value as u16,
            "--descriptors" => o.descriptors = value,
            "--avail" => o.avail = value,
            "--used" => o.used = value,
            "--room" => o.room = value,
            "--chains" => o.chains = value,
            "--event-idx" => o.event_idx = value != 0,
            "--indirect" => o.indirect = value != 0,
            _ => panic!("unknown argument {argument}"),
        }
    }
    (role, o)
}

fn map(o: &Options) -> Memory {
    // SAFETY: the descriptor was passed to this process for this.
    let file = unsafe { File::from_raw_fd(o.memory) };
    let region = MmapRegion::from_file(FileOffset::new(file, 0), o.size).expect("mmap");
    let region = GuestRegionMmap::new(region, GuestAddress(GUEST)).expect("region");
    Memory::from_regions(vec![region]).expect("memory")
}

/// An eventfd of the test's.
struct Event(File);

impl Event {
    fn new(fd: i32) -> Self {
        // SAFETY: the descriptor was passed to this process for this.
        Event(unsafe { File::from_raw_fd(fd) })
    }

    fn signal(&self) {
        (&self.0).write_all(&1u64.to_ne_bytes()).expect("eventfd");
    }

    fn wait(&self, who: &str) {
        use std::os::fd::AsRawFd;
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid structure.
        let ready = unsafe { libc::poll(&mut poll, 1, 60_000) };
        assert!(ready == 1, "the {who} slept for a minute: a wake-up was lost");
        (&self.0).read_exact(&mut [0; 8]).expect("eventfd");
    }
}

fn request(number: u64) -> Vec<u8> {
    let mut data = number.to_le_bytes().to_vec();
    data.extend((0..number % 57).map(|k| (number + k) as u8));
    data
}

fn answer(request: &[u8]) -> Vec<u8> {
    let mut data = request[..8].to_vec();
    data.extend(request[8..].iter().map(|byte| byte ^ MASK));
    data
}

fn device(memory: &Memory, o: &Options) -> u64 {
    let (kick, call) = (Event::new(o.kick), Event::new(o.call));
    let mut queue = Queue::new(o.queue).expect("queue");
    queue.set_size(o.queue);
    queue.set_desc_table_address(Some(o.descriptors as u32), Some((o.descriptors >> 32) as u32));
    queue.set_avail_ring_address(Some(o.avail as u32), Some((o.avail >> 32) as u32));
    queue.set_used_ring_address(Some(o.used as u32), Some((o.used >> 32) as u32));
    queue.set_event_idx(o.event_idx);
    queue.set_ready(true);
    assert!(queue.is_valid(memory), "the crate refuses the ring");
    let mut served = 0;
    while served < o.chains {
        queue.disable_notification(memory).unwrap();
        while let Some(chain) = queue.pop_descriptor_chain(memory) {
            let head = chain.head_index();
            let mut reader = chain.clone().reader(memory).unwrap();
            let mut writer = chain.writer(memory).unwrap();
            let mut data = Vec::new();
            reader.read_to_end(&mut data).unwrap();
            let number = u64::from_le_bytes(data[..8].try_into().unwrap());
            assert!(data == request(number), "request {number} is {data:?}");
            let data = answer(&data);
            writer.write_all(&data).unwrap();
            queue.add_used(memory, head, data.len() as u32).unwrap();
            served += 1;
            // Now and then, so that batches have all lengths.
            if number % 13 == 0 && queue.needs_notification(memory).unwrap() {
                call.signal();
            }
        }
        if queue.needs_notification(memory).unwrap() {
            call.signal();
        }
        if served < o.chains && !queue.enable_notification(memory).unwrap() {
            kick.wait("device");
        }
    }
    served
}

/// A driver of its own, as the crate's mock cannot reuse descriptors; of the crates it uses memory and descriptors.
struct Driver<'a> {
    memory: &'a Memory,
    o: &'a Options,
    next_avail: u16,
    last_used: u16,
    free: Vec<u16>,
    open: HashMap<u16, u64>,
}

impl Driver<'_> {
    fn load(&self, address: u64) -> u16 {
        self.memory.load(GuestAddress(address), Ordering::Acquire).unwrap()
    }

    fn store(&self, address: u64, value: u16) {
        self.memory.store(value, GuestAddress(address), Ordering::Release).unwrap();
    }

    fn describe(&self, place: u64, address: u64, length: u64, flags: u32, next: u16) {
        let descriptor = Descriptor::new(address, length as u32, flags as u16, next);
        self.memory.write_obj(descriptor, GuestAddress(place)).unwrap();
    }

    /// Tables, requests and answers of a share of the ring.
    fn places(&self, share: u16) -> (u64, u64, u64) {
        let base = self.o.room + u64::from(share) * (64 + 2 * ROOM);
        (base, base + 64, base + 64 + ROOM)
    }

    fn add(&mut self, number: u64) {
        let share = self.free.pop().unwrap();
        let (table, source, target) = self.places(share);
        let data = request(number);
        let length = data.len() as u64;
        self.memory.write_slice(&data, GuestAddress(source)).unwrap();
        self.memory.write_slice(&[0; ROOM as usize], GuestAddress(target)).unwrap();
        let head = share * SHARE;
        // Two descriptors to read and two to write, at odd places.
        let parts = [
            (source, 5, 0),
            (source + 5, length - 5, 0),
            (target, 3, VRING_DESC_F_WRITE),
            (target + 3, ROOM - 3, VRING_DESC_F_WRITE),
        ];
        let (base, first) =
            if self.o.indirect { (table, 0) } else { (self.o.descriptors + 16 * u64::from(head), head) };
        for (index, (address, length, flags)) in parts.into_iter().enumerate() {
            let last = index + 1 == parts.len();
            let (flags, next) = if last { (flags, 0) } else { (flags | VRING_DESC_F_NEXT, first + index as u16 + 1) };
            self.describe(base + 16 * index as u64, address, length, flags, next);
        }
        if self.o.indirect {
            self.describe(self.o.descriptors + 16 * u64::from(head), table, 64, VRING_DESC_F_INDIRECT, 0);
        }
        let slot = u64::from(self.next_avail % self.o.queue);
        self.memory.write_obj(head, GuestAddress(self.o.avail + 4 + 2 * slot)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        assert!(self.open.insert(head, number).is_none());
    }

    /// Whether the device wants a kick for what has been exposed since `old`.
    fn publish(&self, old: u16) -> bool {
        self.store(self.o.avail + 2, self.next_avail);
        fence(Ordering::SeqCst);
        if self.o.event_idx {
            let event = self.load(self.o.used + 4 + 8 * u64::from(self.o.queue));
            return self.next_avail.wrapping_sub(event).wrapping_sub(1) < self.next_avail.wrapping_sub(old);
        }
        u32::from(self.load(self.o.used)) & VRING_USED_F_NO_NOTIFY == 0
    }

    fn collect(&mut self) -> u64 {
        let mut count = 0;
        while self.load(self.o.used + 2) != self.last_used {
            let slot = u64::from(self.last_used % self.o.queue);
            let element: [u32; 2] = [0, 4].map(|offset| {
                self.memory.read_obj(GuestAddress(self.o.used + 4 + 8 * slot + offset)).unwrap()
            });
            let head = element[0] as u16;
            let number = self.open.remove(&head).expect("a head that is not open");
            let expected = answer(&request(number));
            assert!(element[1] as usize == expected.len(), "chain {number} has {} bytes", element[1]);
            let mut found = vec![0; expected.len()];
            let (_, _, target) = self.places(head / SHARE);
            self.memory.read_slice(&mut found, GuestAddress(target)).unwrap();
            assert!(found == expected, "answer {number} is {found:?}");
            self.free.push(head / SHARE);
            self.last_used = self.last_used.wrapping_add(1);
            count += 1;
        }
        count
    }

    /// Ask for a call; whether there is something already.
    fn enable(&self) -> bool {
        if self.o.event_idx {
            self.store(self.o.avail + 4 + 2 * u64::from(self.o.queue), self.last_used);
        } else {
            self.store(self.o.avail, 0);
        }
        fence(Ordering::SeqCst);
        self.load(self.o.used + 2) != self.last_used
    }

    fn disable(&self) {
        if !self.o.event_idx {
            self.store(self.o.avail, VRING_AVAIL_F_NO_INTERRUPT as u16);
        }
    }
}

fn driver(memory: &Memory, o: &Options) -> u64 {
    let (kick, call) = (Event::new(o.kick), Event::new(o.call));
    let free = (0..o.queue / SHARE).collect();
    let mut driver = Driver { memory, o, next_avail: 0, last_used: 0, free, open: HashMap::new() };
    let (mut offered, mut done) = (0, 0);
    while done < o.chains {
        let old = driver.next_avail;
        let most = 1 + offered % u64::from(o.queue / SHARE);
        for _ in 0..most {
            if driver.free.is_empty() || offered == o.chains {
                break;
            }
            driver.add(offered);
            offered += 1;
        }
        if old != driver.next_avail && driver.publish(old) {
            kick.signal();
        }
        let found = driver.collect();
        done += found;
        if found == 0 && (driver.free.is_empty() || offered == o.chains) {
            if !driver.enable() {
                call.wait("driver");
            }
            driver.disable();
        }
    }
    done
}

/// The crate's mock driver: one round, as it fills the ring from its start only. Its used ring begins inside of its
/// available ring (the end of that is counted in elements, not bytes), which leaves room for half of the ring.
fn mock(memory: &Memory, o: &Options) -> u64 {
    let (kick, call) = (Event::new(o.kick), Event::new(o.call));
    let mock = MockSplitQueue::create(memory, GuestAddress(o.descriptors), o.queue);
    println!("{} {} {}", mock.desc_table_addr().0, mock.avail_addr().0, mock.used_addr().0);
    let chains = o.chains as u16;
    assert!(chains <= o.queue / 2);
    for number in 0..o.chains {
        let base = o.room + number * 2 * ROOM;
        let data = request(number);
        memory.write_slice(&data, GuestAddress(base)).unwrap();
        let first = number as u16 * 2;
        let chain = [
            (base, data.len() as u64, VRING_DESC_F_NEXT, first + 1),
            (base + ROOM, ROOM, VRING_DESC_F_WRITE, 0),
        ]
        .map(|(address, length, flags, next)| {
            RawDescriptor::from(Descriptor::new(address, length as u32, flags as u16, next))
        });
        mock.add_desc_chains(&chain, first).unwrap();
    }
    kick.signal();
    while mock.used().idx().load() != chains {
        call.wait("mock driver");
    }
    for number in 0..o.chains {
        let element = mock.used().ring().ref_at(number as usize).unwrap().load();
        let expected = answer(&request(u64::from(element.id()) / 2));
        assert!(element.len() as usize == expected.len());
        let mut found = vec![0; expected.len()];
        let place = o.room + u64::from(element.id()) * ROOM + ROOM;
        memory.read_slice(&mut found, GuestAddress(place)).unwrap();
        assert!(found == expected, "answer {number} is {found:?}");
    }
    o.chains
}

fn main() {
    let (role, o) = options();
    let memory = map(&o);
    let count = match role.as_str() {
        "device" => device(&memory, &o),
        "driver" => driver(&memory, &o),
        "mock" => mock(&memory, &o),
        _ => panic!("unknown role {role}"),
    };
    println!("{count} chains");
}
