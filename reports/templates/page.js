// Filters by verdict and by words. The page is complete without it.
(() => {
  const form = document.getElementById("filter");
  const claims = [...document.querySelectorAll(".claim")];
  if (!claims.length) return;
  const words = new Map(claims.map((claim) => [claim, claim.textContent.toLowerCase()]));
  const boxes = [...form.querySelectorAll("input[type=checkbox]")];
  const search = form.querySelector("input[type=search]");
  const output = form.querySelector("output");
  const apply = () => {
    const shown = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let visible = 0;
    for (const claim of claims) {
      const fits = shown.has(claim.dataset.status) && wanted.every((word) => words.get(claim).includes(word));
      claim.hidden = !fits;
      visible += fits;
      const entry = document.querySelector(`nav [data-for="${claim.id}"]`);
      if (entry) entry.hidden = !fits;
    }
    for (const chapter of document.querySelectorAll("section.chapter")) {
      chapter.hidden = !chapter.querySelector(".claim:not([hidden])");
    }
    output.textContent = visible === claims.length ? "" : `${visible} of ${claims.length}`;
  };
  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target || !target.closest("[hidden]")) return;
    for (const box of boxes) box.checked = true;
    search.value = "";
    apply();
    target.scrollIntoView();
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", reveal);

  // The contents open at the chapter that is being read.
  const chapters = [...document.querySelectorAll("section.chapter")];
  const entries = [...document.querySelectorAll("nav li.chapter")];
  const follow = new IntersectionObserver(
    (changes) => {
      for (const change of changes) {
        const entry = entries[chapters.indexOf(change.target)];
        entry.classList.toggle("here", change.isIntersecting);
        entry.querySelector("details").open = change.isIntersecting;
      }
    },
    { rootMargin: "-20% 0px -75% 0px" },
  );
  chapters.forEach((chapter) => follow.observe(chapter));
})();
