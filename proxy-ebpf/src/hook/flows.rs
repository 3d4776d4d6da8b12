//! The program that no hook carries: the agent runs it to have flows looked through and ended.

use core::arch::asm;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use proxy_common::abi::{FlowId, Timeouts, ask};
use proxy_common::wire::Frame as _;

use crate::maps;
use crate::scratch::scratch;
use crate::skb::Skb;
use crate::subprog::{
    FROM_OLD_TABLES, FROM_TABLES, subprog_adopt, subprog_lose, subprog_sweep, subprog_take,
    subprog_take_apart,
};

/// What it is asked is in [`ask`].
#[classifier]
pub fn flows(ctx: TcContext) -> i32 {
    answer(&Skb(ctx.as_ptr().cast())).unwrap_or(-1)
}

#[inline(always)]
fn answer(skb: &Skb) -> Option<i32> {
    let [work, first, count] = skb.load::<[u32; 3]>(ask::OFFSET)?;
    let mut done = 0;
    match work {
        ask::SWEEP => {
            scratch()?.timeouts = Timeouts::from_words(skb.load::<[u32; 10]>(ask::BODY)?);
            for n in 0..ask::MOST {
                if n >= count {
                    break;
                }
                done += subprog_sweep(first.wrapping_add(n));
            }
        }
        ask::END => {
            for n in 0..ask::MOST_IDS {
                if n >= first {
                    break;
                }
                let [low, high] = skb.load::<[u32; 2]>(ask::BODY + n as usize * 8)?;
                done += subprog_take_apart(FlowId(u64::from(high) << 32 | u64::from(low)).0);
            }
        }
        ask::ADOPT => {
            done = subprog_adopt(skb.0, ask::BODY as u32, 0);
        }
        ask::CARRY => {
            let from = if first == 1 { FROM_TABLES } else { FROM_OLD_TABLES };
            done = subprog_adopt(skb.0, ask::BODY as u32, from);
        }
        ask::COUNT => {
            let [low, high] = skb.load::<[u32; 2]>(ask::BODY)?;
            done = u32::from(add_count(first, u64::from(high) << 32 | u64::from(low)));
        }
        ask::TAKE => done = subprog_take(u64::from(count) << 32 | u64::from(first)),
        ask::LOSE => {
            for n in 0..ask::MOST_IDS {
                if n >= first {
                    break;
                }
                let [low, high] = skb.load::<[u32; 2]>(ask::BODY + n as usize * 8)?;
                done += subprog_lose(u64::from(high) << 32 | u64::from(low));
            }
        }
        _ => return None,
    }
    Some(done as i32)
}

/// Adds to a counter in one instruction: the hooks interrupt this program, and count in between.
#[inline(always)]
fn add_count(which: u32, count: u64) -> bool {
    let counter = if which < ask::STATS {
        maps::REASONS.get_ptr_mut(which)
    } else {
        // SAFETY: places in an element of the map, which is there.
        maps::SERVICE_STATS.get_ptr_mut((which - ask::STATS) / 4).map(|stats| unsafe {
            match which & 3 {
                0 => &raw mut (*stats).chosen,
                1 => &raw mut (*stats).refused,
                _ => &raw mut (*stats).dropped,
            }
        })
    };
    let Some(counter) = counter else { return false };
    // SAFETY: the element stays mapped, and a counter is only ever added to.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) count, options(nostack)) };
    true
}
