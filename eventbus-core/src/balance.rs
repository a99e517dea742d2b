//! Which member of a group is to have which partition: even, and with as few moves as can be. The
//! in-memory broker, leases, and adapters whose broker shares out nothing do it by this.

/// One partition to be given to a member.
#[derive(Clone, Copy, Debug)]
#[allow(
    clippy::exhaustive_structs,
    reason = "a plain pair that adapters create"
)]
pub struct Share {
    /// Its topic, as a number that [`balance`] asks with who may read it.
    pub topic: usize,
    /// The member that has it, or that it is promised to.
    pub holder: Option<usize>,
}

/// Answers for each of `shares` the index of the member that is to have it.
///
/// `may_read(member, topic)` says who may have what. Members that may read the same topics differ
/// by at most one partition, counted over all topics; a partition moves only for that. Whoever asks
/// with the same shares and members gets the same answer.
pub fn balance(
    shares: &[Share],
    members: usize,
    may_read: impl Fn(usize, usize) -> bool,
) -> Vec<Option<usize>> {
    let mut load = vec![0usize; members];
    let mut targets: Vec<Option<usize>> = shares.iter().map(|share| share.holder).collect();
    for holder in targets.iter().flatten() {
        load[*holder] += 1;
    }
    let lightest = |load: &[usize], topic: usize| {
        (0..members)
            .filter(|member| may_read(*member, topic))
            .min_by_key(|member| load[*member])
    };
    for (share, target) in shares.iter().zip(&mut targets) {
        if target.is_none() {
            *target = lightest(&load, share.topic);
            if let Some(member) = *target {
                load[member] += 1;
            }
        }
    }
    // Every move takes from a member with at least two more, so it ends. One that closes no gap
    // by itself can open the way for another, hence the repetition.
    let mut moved = true;
    while moved {
        moved = false;
        // The last ones move first: a member keeps its oldest partitions.
        for (share, target) in shares.iter().zip(&mut targets).rev() {
            let (Some(from), Some(to)) = (*target, lightest(&load, share.topic)) else {
                continue;
            };
            if load[from] >= load[to] + 2 {
                load[from] -= 1;
                load[to] += 1;
                *target = Some(to);
                moved = true;
            }
        }
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(holders: &[Option<usize>]) -> Vec<Share> {
        holders
            .iter()
            .map(|holder| Share {
                topic: 0,
                holder: *holder,
            })
            .collect()
    }

    #[test]
    fn partitions_are_shared_evenly() {
        let targets = balance(&shares(&[None; 7]), 3, |_, _| true);
        let mut load = [0; 3];
        for target in targets {
            load[target.expect("everybody may read it")] += 1;
        }
        load.sort_unstable();
        assert_eq!(load, [2, 2, 3]);
    }

    #[test]
    fn a_joining_member_gets_its_part_and_nothing_else_moves() {
        let before = [Some(0), Some(0), Some(0), Some(1), Some(1), Some(1)];
        let after = balance(&shares(&before), 3, |_, _| true);
        let moved: Vec<_> = after.iter().zip(&before).filter(|(a, b)| a != b).collect();
        assert_eq!(moved, [(&Some(2), &Some(0)), (&Some(2), &Some(1))]);
    }

    #[test]
    fn many_topics_of_one_partition_are_shared_too() {
        let shares: Vec<_> = (0..10)
            .map(|topic| Share {
                topic,
                holder: None,
            })
            .collect();
        let targets = balance(&shares, 2, |_, _| true);
        let first = targets.iter().filter(|target| **target == Some(0)).count();
        assert_eq!(first, 5);
    }

    #[test]
    fn only_subscribers_of_a_topic_get_its_partitions() {
        let shares: Vec<_> = [0, 0, 1, 1, 2]
            .map(|topic| Share {
                topic,
                holder: None,
            })
            .to_vec();
        let targets = balance(&shares, 2, |member, topic| member == topic);
        assert_eq!(targets, [Some(0), Some(0), Some(1), Some(1), None]);
    }
}
