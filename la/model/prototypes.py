"""Image-prompt fusion, pooling and the class-example mixer: supports to class prototypes (section 4.2)."""

from torch import Tensor, nn

from la.episodes.batch import Pairs
from la.model.attention import Attention, SelfAttentionBlock, TwoWayTransformer


class ImagePromptFusion(nn.Module):
    """Equations 1 to 3, then global average pooling to one embedding e_{l,c} per annotated pair.

    The equations write no residual; without one, equation 3 keeps nothing of the image but what the prompts say. As in
    the two-way transformer that the text names, each attention has a residual and a layer norm after it. There is no
    feed-forward block, and attention works at width D/2. `depth` goes through equations 2 and 3 so many times, each
    time with weights of its own.
    """

    def __init__(self, dim: int, heads: int = 8, depth: int = 1):
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(dim, heads) for _ in range(depth))

    def forward(self, image: Tensor, dense: Tensor, sparse: Tensor, valid: Tensor, place: Tensor) -> Tensor:
        """image F_l and dense P_d (P, h*w, D), sparse P_s (P, T, D), valid (P, T), place PE (h*w, D) -> (P, D)."""
        fused = image + dense  # equation 1
        for layer in self.layers:
            fused, sparse = layer(fused, sparse, valid, place)
        return fused.mean(1)


class FusionLayer(nn.Module):
    """Equations 2 and 3, once."""

    def __init__(self, dim: int, heads: int = 8):
        super().__init__()
        self.token_to_image = Attention(dim, dim // 2, heads)
        self.image_to_token = Attention(dim, dim // 2, heads)
        self.token_norm = nn.LayerNorm(dim)
        self.image_norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor, sparse: Tensor, valid: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """image F (P, h*w, D), sparse P_s (P, T, D), valid (P, T), place PE (h*w, D) -> F and P_s anew."""
        placed = image + place
        sparse = self.token_norm(sparse + self.token_to_image.gather(sparse, placed, placed))  # equation 2
        image = self.image_norm(image + self.image_to_token.spread(placed, sparse, sparse, valid))  # equation 3
        return image, sparse


class TwoWayFusion(nn.Module):
    """The fusion of the released model: a two-way transformer between prompts and image, of which the image is pooled.

    Its tokens' last look at the image is in the released state dicts but has no effect, so it is not trained either.
    """

    def __init__(self, dim: int, heads: int, depth: int, feed_forward: int):
        super().__init__()
        self.transformer = TwoWayTransformer(dim, heads, feed_forward, depth)
        for unused in (self.transformer.last_attention, self.transformer.last_norm):
            unused.requires_grad_(False)

    def forward(self, image: Tensor, dense: Tensor, sparse: Tensor, valid: Tensor, place: Tensor) -> Tensor:
        """As `ImagePromptFusion.forward`."""
        _, fused = self.transformer(sparse, image + dense, place, valid, image_only=True)
        return fused.mean(1)


class ClassExampleMixer(nn.Module):
    """e_c = MeanPool(SelfAttn([e_{1,c} ... e_{L,c}])) over the pairs of one class, equation 4; or the plain mean.

    With `jointly`, attention goes over all pairs of the episode, whatever their class, as in the released model. Pairs
    that do not exist are masked. Attention works at width D/2 with a residual and a layer norm.
    """

    def __init__(self, dim: int, heads: int = 8, attend: bool = True, feed_forward: int | None = None, jointly=False):
        super().__init__()
        self.jointly = jointly
        self.block = SelfAttentionBlock(dim, dim // 2, heads, feed_forward) if attend else None

    def forward(self, pairs: Pairs, embeddings: Tensor) -> Tensor:
        """embeddings (P, D) -> prototypes (B, C, D); zeros for a slot without pairs."""
        episodes, slots = pairs.slots.shape
        if self.block is not None:
            rows, row, column, columns = (
                (episodes, pairs.episode, pairs.order, pairs.most_orders)
                if self.jointly
                else (episodes * slots, pairs.slot, pairs.example, pairs.most_examples)
            )
            table = embeddings.new_zeros(rows, columns, embeddings.shape[-1]).index_put((row, column), embeddings)
            exists = pairs.slots.new_zeros(rows, columns).index_put((row, column), pairs.slots.new_ones(len(row)))
            embeddings = self.block(table, exists)[row, column]
        at = (pairs.slot, pairs.example)
        shape = (episodes * slots, pairs.most_examples)
        table = embeddings.new_zeros(*shape, embeddings.shape[-1]).index_put(at, embeddings)
        weights = embeddings.new_zeros(shape).index_put(at, pairs.counted.to(embeddings.dtype))[..., None]
        mean = (table * weights).sum(1) / weights.sum(1).clamp(min=1)
        return mean.unflatten(0, (episodes, slots))
