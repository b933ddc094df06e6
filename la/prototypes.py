"""Image-prompt fusion, pooling and the class-example mixer: supports to class prototypes (section 4.2)."""

from torch import Tensor, nn

from la.attention import Attention
from la.batch import EpisodeBatch


class ImagePromptFusion(nn.Module):
    """Equations 1 to 3, then global average pooling to one embedding e_{l,c} per annotated pair.

    The equations write no residual; without one, equation 3 keeps nothing of the image but what the prompts say. As in
    the two-way transformer that the text names, each attention has a residual and a layer norm after it. There is no
    feed-forward block, and attention works at width D/2.
    """

    def __init__(self, dim: int, heads: int = 8):
        super().__init__()
        self.token_to_image = Attention(dim, dim // 2, heads)
        self.image_to_token = Attention(dim, dim // 2, heads)
        self.token_norm = nn.LayerNorm(dim)
        self.image_norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor, dense: Tensor, sparse: Tensor, valid: Tensor, position: Tensor) -> Tensor:
        """image F_l and dense P_d (P, h*w, D), sparse P_s (P, T, D), valid (P, T), position (h*w, D) -> (P, D)."""
        fused = image + dense  # equation 1
        placed = fused + position
        sparse = self.token_norm(sparse + self.token_to_image.gather(sparse, placed))  # equation 2
        fused = self.image_norm(fused + self.image_to_token.spread(placed, sparse, valid))  # equation 3
        return fused.mean(1)


class ClassExampleMixer(nn.Module):
    """e_c = MeanPool(SelfAttn([e_{1,c} ... e_{L,c}])) over the pairs of one class, equation 4; or the plain mean.

    Pairs that do not exist are masked. Attention works at width D/2 with a residual and a layer norm.
    """

    def __init__(self, dim: int, attend: bool, heads: int = 8):
        super().__init__()
        self.attention = Attention(dim, dim // 2, heads) if attend else None
        self.norm = nn.LayerNorm(dim) if attend else None

    def forward(self, batch: EpisodeBatch, embeddings: Tensor) -> Tensor:
        """embeddings (P, D) -> prototypes (B, C, D); zeros for a slot without pairs."""
        episodes, slots = batch.slots.shape
        at = (batch.pair_slot, batch.pair_example)
        table = embeddings.new_zeros(episodes * slots, batch.examples, embeddings.shape[-1]).index_put(at, embeddings)
        valid = batch.slots.new_zeros(table.shape[:2]).index_put(at, batch.slots.new_ones(len(embeddings)))
        if self.attention is not None:
            # an empty slot may attend anywhere: its mean is zero all the same, and a row of nothing would be NaN
            attendable = valid | ~valid.any(1, keepdim=True)
            table = self.norm(table + self.attention(table, table, table, attendable))
        weights = valid.to(table.dtype)[..., None]
        mean = (table * weights).sum(1) / weights.sum(1).clamp(min=1)
        return mean.unflatten(0, (episodes, slots))
